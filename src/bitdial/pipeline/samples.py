"""Calibration samples out of what a caller passes: tensors, batches, DataLoaders, tuples, dicts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitdial.errors import CalibrationError, CaptureError
from bitdial.graph.onnx import OnnxNetwork, is_onnx
from bitdial.pipeline.causes import Trial
from bitdial.pipeline.doubts import warn_user

_TARGETS = frozenset({"label", "labels", "target", "targets"})
_OPTIONS = (bool, int, float, str)


@dataclass(frozen=True)
class Samples:
    """Calibration samples for a network.

    inputs  one tensor per model input, batch first
    names   their keyword names, where the batches were dicts
    rows    length of the first dimension in the first batch as it was given
    spare   tensors of the first tuple that were taken for no inputs
    """

    inputs: list[Tensor]
    names: list[str] | None
    rows: int
    spare: list[Tensor]


def plain_module(model: Any) -> nn.Module:
    """The network itself, out of DataParallel, DistributedDataParallel or torch.compile's wrapper, or out of an ONNX file.

    Raises CaptureError for what is no network whose operators can be read.
    """
    if is_onnx(model):
        return OnnxNetwork(model)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
        assert isinstance(model, nn.Module)
    if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
        return plain_module(compiled)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise CaptureError(
            f"the model is a {kind}, no torch.nn.Module: pass the network itself (put a function into a Module's forward; "
            "load a state dict or a checkpoint into the network that it belongs to), or the path of a .onnx file"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            told = f"its module '{path}'" if path else "the model"
            raise CaptureError(
                f"{told} is a TorchScript module ({type(module).__name__}), whose operators torch.export cannot read: pass the "
                "original module, from before torch.jit.trace or torch.jit.script; of a file only, build the network in Python "
                "and load the weights with load_state_dict(scripted.state_dict())"
            )
    return model


def gather(calibration: Any, model: nn.Module, limit: int) -> Samples:
    """Calibration data of any accepted form, at most `limit` samples of it.

    Of tuples the leading elements are the inputs that forward() requires; of dicts all that are named like its parameters. What
    might have been meant as an input and is left out is told in a warning. Raises CalibrationError naming what is wrong with
    which batch.
    """
    batches = [calibration] if isinstance(calibration, (torch.Tensor, Mapping)) else calibration
    if not isinstance(batches, Iterable):
        kind = type(calibration).__name__
        if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
            raise CalibrationError(
                f"calibration is a {kind}, a data set of single samples: pass torch.utils.data.DataLoader(data, batch_size=32)"
            )
        raise CalibrationError(f"calibration is a {kind}: pass a tensor, an iterable or a DataLoader")
    reader = _Reader(model)
    columns: list[list[Tensor]] = []
    count, rows = 0, 0
    for number, batch in enumerate(batches):
        if count >= limit:
            break
        parts = reader.parts(batch, number)
        for part in parts:
            if not isinstance(part, Tensor) or part.dim() == 0:
                raise CalibrationError(
                    f"calibration batch {number} holds a {type(part).__name__}: pass tensors whose first dimension is the batch"
                )
        if columns and [p.shape[1:] for p in parts] != [c[0].shape[1:] for c in columns]:
            raise CalibrationError(
                f"calibration batch {number} has shape {[list(p.shape) for p in parts]}, the first had "
                f"{[list(c[0].shape) for c in columns]}: all samples must have one shape"
            )
        if columns and [p.dtype for p in parts] != [c[0].dtype for c in columns]:
            raise CalibrationError(
                f"calibration batch {number} is {[str(p.dtype) for p in parts]}, the first was "
                f"{[str(c[0].dtype) for c in columns]}: all samples must have one dtype"
            )
        if len({p.shape[0] for p in parts}) > 1:
            raise CalibrationError(
                f"calibration batch {number} has inputs of {[p.shape[0] for p in parts]} samples: all must have the same"
            )
        rows = rows or parts[0].shape[0]
        columns = columns or [[] for _ in parts]
        for column, part in zip(columns, parts, strict=True):
            column.append(part[: limit - count].detach().cpu())
        count += len(columns[0][-1])
    if count == 0:
        raise CalibrationError("the calibration data are empty: pass at least one sample (256 are usual)")
    return Samples([torch.cat(column) for column in columns], reader.names, rows, reader.spare)


class _Reader:
    """Finds the model's inputs in one batch after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(inspect.signature(model.forward).parameters)
        self.positional = [
            p for p in self.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self.required = sum(p.default is inspect.Parameter.empty for p in self.positional)
        self.names: list[str] | None = None
        self.left_out: set[str] = set()
        self.spare: list[Tensor] = []

    def parts(self, batch: Any, number: int) -> list[Any]:
        """The inputs in a batch, in the order of the first batch's. Raises CalibrationError."""
        if isinstance(batch, Mapping):
            return self._named(batch, number)
        if not isinstance(batch, (tuple, list)):
            return [batch]
        taken = max(1, self.required)
        if number == 0:
            self._look_at_rest(list(batch[taken:]), taken)
        return list(batch[:taken])

    def _look_at_rest(self, rest: list[Any], taken: int) -> None:
        """Behind the inputs usually come labels; they may have been meant for optional parameters, too."""
        self.spare = [x for x in rest if isinstance(x, Tensor)]
        several = next((p for p in self.parameters.values() if p.kind is p.VAR_POSITIONAL), None)
        free = [p for p in self.positional[taken:] if p.default is None or isinstance(p.default, Tensor)]
        if not self.spare or not (free or several):
            return
        meant = f"the optional '{free[0].name}'" if free or several is None else f"more of '*{several.name}'"
        pairs = ", ".join(f"'{p.name}': ..." for p in [*self.positional[:taken], *free[:1]])
        remedy = f"pass dicts {{{pairs}}}" if free else "give forward() named parameters"
        first = "first is taken as the input" if taken == 1 else f"first {taken} are taken as inputs"
        warn_user(
            f"calibration tuples have {taken + len(rest)} elements, of which the {first} and the rest as labels; if those are "
            f"{meant} of forward(), {remedy}"
        )

    def _named(self, batch: Mapping[Any, Any], number: int) -> list[Any]:
        given = [k for k in self.parameters if batch.get(k) is not None and k not in self.left_out]
        if self.names is None:
            self._settle(batch, given, number)
        assert self.names is not None
        given = [k for k in given if k not in self.left_out]
        for k in given:
            value = batch[k]
            if isinstance(value, Tensor):
                continue
            default = self.parameters[k].default
            if isinstance(value, _OPTIONS) and type(value) is type(default) and value == default:
                continue  # as the network does without it
            told = "an option is fixed in the network itself, or in a Module around it" if isinstance(value, _OPTIONS) else (
                "pass a tensor whose first dimension is the batch"
            )  # fmt: skip
            raise CalibrationError(
                f"calibration batch {number} has for parameter '{k}' of forward() a {type(value).__name__}: {told}"
            )
        given = [k for k in given if isinstance(batch[k], Tensor)]
        missing = [k for k in self.names if k not in given]
        if missing:
            raise CalibrationError(f"calibration batch {number} lacks {missing}, which the first batch had")
        added = [k for k in given if k not in self.names]
        if added:
            raise CalibrationError(f"calibration batch {number} has {added}, which the first batch lacked")
        return [batch[k] for k in self.names]

    def _settle(self, batch: Mapping[Any, Any], given: list[str], number: int) -> None:
        """Which parameters are the inputs: those of the first batch, without a training target that forward() can do without."""
        tensors = [k for k in given if isinstance(batch[k], Tensor)]
        for k in tensors:
            optional = self.parameters[k].default is not inspect.Parameter.empty
            others = {name: batch[name] for name in tensors if name != k and name not in self.left_out}
            if k in _TARGETS and optional and others and not self._is_input(k, batch[k], others):
                self.left_out.add(k)
        self.names = [k for k in tensors if k not in self.left_out]
        if not self.names:
            raise CalibrationError(
                f"calibration batch {number} is a dict with {sorted(map(str, batch))}, none of which is a tensor "
                f"parameter of forward({', '.join(self.parameters)})"
            )
        if self.left_out:
            warn_user(
                f"calibration: {sorted(self.left_out)} is left out as a training target (without it forward() answers the same, "
                "or without a loss); drop it from the dicts, or give the parameter no default if it is an input"
            )
        known = {*self.parameters, *_TARGETS}
        if unknown := sorted(str(k) for k, value in batch.items() if isinstance(value, Tensor) and k not in known):
            warn_user(
                f"calibration: {unknown} is left out, since forward({', '.join(self.parameters)}) has no parameter of that name; "
                "rename it if it is an input"
            )

    def _is_input(self, name: str, value: Tensor, others: dict[str, Any]) -> bool:
        """Whether the network's answer depends on an optional parameter that is called like a target: with a target, it would be
        the same, or come with a loss, a number without dimensions."""
        trial = Trial(self.model, {k: v[:2].cpu() for k, v in others.items()})
        without, answer = trial.run(), trial.run({name: value[:2].cpu()})
        if without.error is not None or answer.error is not None:
            return without.error is not None and answer.error is None
        if any(x.dim() == 0 for x in answer.outputs):
            return False
        return not without.same(answer)
