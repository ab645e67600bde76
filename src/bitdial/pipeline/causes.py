"""Why a network could not be captured, when the samples or the network are to blame rather than the way it is written.

torch.export only tells where it stopped. Here the network itself is run on two of the samples, as they are and changed in the
ways that people forget: the change with which it runs is the cause.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitdial.errors import CalibrationError, CaptureError
from bitdial.graph.capture import evaluation_mode

if TYPE_CHECKING:
    from bitdial.pipeline.samples import Samples


@dataclass(frozen=True)
class Answer:
    """What a network made of some inputs: its output tensors, or the error."""

    outputs: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    def same(self, other: Answer) -> bool:
        """Whether the outputs are equal, to the bit."""
        pairs = zip(self.outputs, other.outputs, strict=False)
        return len(self.outputs) == len(other.outputs) and all(a.shape == b.shape and _equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


@dataclass(frozen=True)
class Trial:
    """Runs of a network in evaluation mode that leave no traces: buffers and the random generator's state are put back."""

    model: nn.Module
    inputs: Sequence[Tensor] | Mapping[str, Tensor]

    def run(self, more: Mapping[str, Tensor] | None = None, seed: int = 0) -> Answer:
        """The answer to the inputs, with `more` of them by name; seed: of the random numbers that are drawn, if any."""
        named = dict(self.inputs) if isinstance(self.inputs, Mapping) else {}
        plain = () if isinstance(self.inputs, Mapping) else tuple(self.inputs)
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        with (
            evaluation_mode(self.model), torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            try:
                return Answer([x for x in tree_leaves(self.model(*plain, **named, **(more or {}))) if isinstance(x, Tensor)])
            except Exception as error:  # whatever a stranger's forward() raises
                return Answer(error=error)
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextmanager
def causes_named(model: nn.Module, samples: Samples) -> Iterator[None]:
    """Around the capture of a network: a CaptureError whose cause is found is raised anew, with cause and remedy."""
    try:
        yield
    except CaptureError as error:
        found = find_cause(model, samples, error)
        if found is None:
            raise
        raise found from error


def find_cause(model: nn.Module, samples: Samples, error: CaptureError) -> CaptureError | CalibrationError | None:
    """The error to raise instead of the one that capturing `model` with `samples` ended in; None: that one says it."""

    def attempt(inputs: Sequence[Tensor], seed: int = 0) -> Answer:
        return Trial(model, inputs if samples.names is None else dict(zip(samples.names, inputs, strict=True))).run(seed=seed)

    as_given = [x[:2] for x in samples.inputs]
    answer = attempt(as_given)
    if answer.error is None:
        if answer.same(attempt(as_given, seed=1)):
            return None
        return CaptureError(
            f"{type(model).__name__} draws random numbers in evaluation mode, its answers to the same input differ: is dropout "
            f"left on? F.dropout(x, p) needs training=self.training, nn.Dropout needs nothing. ({error})"
        )
    for words, inputs in _changes(samples):
        if attempt(inputs).error is None:
            return CalibrationError(f"{'. '.join(words)} (as it is: {_first_line(answer.error)})")
    if samples.spare and samples.names is None and attempt([*as_given, *(x[:2] for x in samples.spare)]).error is None:
        return CaptureError(
            f"forward(*inputs) of {type(model).__name__} does not tell how many inputs it takes, so that only the first of each "
            "calibration tuple was one: give it named parameters"
        )
    if error.__cause__ is None:  # not the export's: it knows what it says
        return None
    shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {['N', *x.shape[1:]]}" for x in as_given).replace("'", "")
    return CaptureError(
        f"{error.args[0].partition('. To do:')[0]}. To do: the network itself cannot be run on the calibration data ({shapes}, "
        "N = batch size); prepare them as for training, so that model(batch) works"
    )


Change = tuple[str, Callable[[Tensor, int], Tensor | None]]

# (what to tell, the change of an input with its first batch's length; None: does not apply). The first that mends wins.
_SHAPES: tuple[Change, ...] = (
    ("", lambda x, rows: x[:2]),
    (
        "The calibration samples have no batch dimension: pass batches [N, ...], for example torch.stack(samples) or "
        "DataLoader(data, batch_size=32)",
        lambda x, rows: x[:rows].unsqueeze(0),
    ),
    (
        "The calibration data have their channels last, the network takes them first: pass x.movedim(-1, 1)",
        lambda x, rows: x[:2].movedim(-1, 1) if x.dim() >= 3 else None,
    ),
    (
        "The calibration samples have no batch dimension and their channels last: pass batches [N, C, ...], for example "
        "torch.stack(samples).movedim(-1, 1)",
        lambda x, rows: x[:rows].movedim(-1, 0).unsqueeze(0) if x.dim() >= 3 else None,
    ),
    ("The calibration data have no channel dimension: pass x.unsqueeze(1)", lambda x, rows: x[:2].unsqueeze(1)),
)
_TYPES: tuple[Change, ...] = (
    (
        "the network computes in float32: pass x.float()",
        lambda x, rows: x.float() if x.is_floating_point() and x.dtype != torch.float32 else None,
    ),
    (
        "the network computes in float32: pass x.float(), scaled and normalized as in training",
        lambda x, rows: None if x.is_floating_point() else x.float(),
    ),
    (
        "the network looks up indices: pass x.long()",
        lambda x, rows: x.long() if x.is_floating_point() else None,
    ),
)


def _changes(samples: Samples) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(what to tell, the inputs so changed): the shape of all inputs, the type of one or of all that it is for, both."""
    names = samples.names or [str(i) for i in range(len(samples.inputs))]
    for shape_words, reshape in _SHAPES:
        shaped = [y for x in samples.inputs if (y := reshape(x, samples.rows)) is not None]
        if len(shaped) < len(names):
            continue
        told = [shape_words] if shape_words else []
        if told:
            yield told, shaped
        for type_words, convert in _TYPES:
            new = {i: y for i, x in enumerate(shaped) if (y := convert(x, samples.rows)) is not None}
            for which in [*([i] for i in new), *([list(new)] if len(new) > 1 else [])]:
                dtypes = " and ".join(sorted({str(shaped[i].dtype).removeprefix("torch.") for i in which}))
                whose = "The calibration data are" if len(which) == len(names) else f"Calibration input '{names[which[0]]}' is"
                yield [*told, f"{whose} {dtypes}, {type_words}"], [new[i] if i in which else x for i, x in enumerate(shaped)]


def _first_line(error: Exception | None) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]
