"""One engine for several sequence lengths: a batch goes to the shortest that holds it, padded with zeros. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from bitdial.engines.base import Dial, Engine
from bitdial.errors import InputError
from bitdial.graph.inputs import split_batch
from bitdial.quantization.lengths import at_length, sequence_axes, sequence_length
from bitdial.quantization.program import Program


class LengthsEngine(Dial):
    """An engine per length of a program, one dial for all of them.

    program: has `lengths`. create: makes the engine for one length. Zeros are padded, at the end: the index of padding
    in most vocabularies, and what masks mean by "not there"; the network leaves such places out of its answers (see `quantize`).
    Zeros that a batch ends with itself are cut off likewise, so that clients may pad to the full length, unless outputs have an
    axis of that length, which are cut back to the batch's. What else an engine offers is that of the full length.
    """

    def __init__(self, program: Program, create: Callable[[Program], Engine]) -> None:
        super().__init__(program)
        self.full = sequence_length(program)
        self.axes = sequence_axes(program)
        self.engines = {length: create(at_length(program, length)) for length in sorted([*program.lengths, self.full])}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "engines" not in vars(self):
            raise AttributeError(name)
        return getattr(self.engines[self.full], name)

    def run(self, batch: Any, ratio: float | None = None) -> Any:
        """Outputs for a batch of any length up to the longest. Raises InputError, RatioError."""
        return self.run_with_ratio(batch, ratio)[0]

    def run_with_ratio(self, batch: Any, ratio: float | None = None) -> tuple[Any, float]:
        """Outputs, and the ratio they were computed at."""
        index = self.index(ratio)
        used = self.program.ratios[index]
        parts = split_batch(self.program, batch)
        given = self._length(parts)
        needed = given if any(name in self.axes for name in self.program.outputs) else self._filled(parts, given)
        length = next(n for n in self.engines if n >= needed)
        fitted = [self._fitted(name, x, length) for name, x in zip(self.program.inputs, parts, strict=True)]
        outputs = self.engines[length].run(fitted if len(fitted) > 1 else fitted[0], used)
        if given == length or needed < given:
            return outputs, used
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        cut = tuple(
            y if name not in self.axes else y[(*[slice(None)] * self.axes[name], slice(given))]
            for name, y in zip(self.program.outputs, results, strict=True)
        )
        return (cut if isinstance(outputs, tuple) else cut[0]), used

    def _length(self, parts: list[Any]) -> int:
        """The length of a batch's sequences. Raises InputError."""
        found: dict[str, int] = {}
        for name, x in zip(self.program.inputs, parts, strict=True):
            axis = self.axes.get(name)
            if axis is not None and len(x.shape) > axis:
                found[name] = int(x.shape[axis])
        if len(set(found.values())) > 1:
            raise InputError(f"the inputs are sequences of different lengths {found}: pad them to one")
        given = next(iter(found.values()), self.full)
        if not 1 <= given <= self.full:
            raise InputError(f"the batch has sequences of length {given}, the model takes 1 to {self.full}: cut them")
        return given

    def _filled(self, parts: list[Any], given: int) -> int:
        """The length without the zeros that all samples end with, in every input; at least 1."""
        filled = 1
        for name, x in zip(self.program.inputs, parts, strict=True):
            axis = self.axes.get(name)
            if axis is None:
                continue
            if not isinstance(x, np.ndarray):
                x = x.detach().cpu().numpy()
            used = np.flatnonzero(x.any(axis=tuple(i for i in range(x.ndim) if i != axis)))
            filled = max(filled, int(used[-1]) + 1 if used.size else 0)
        return min(filled, given)

    def _fitted(self, name: str, x: Any, length: int) -> Any:
        axis = self.axes.get(name)
        if axis is None or len(x.shape) <= axis or x.shape[axis] == length:
            return x
        if x.shape[axis] > length:
            return x[(*[slice(None)] * axis, slice(length))]
        shape = (*x.shape[:axis], length - x.shape[axis], *x.shape[axis + 1 :])
        if isinstance(x, np.ndarray):
            return np.concatenate([x, np.zeros(shape, x.dtype)], axis)
        torch = importlib.import_module("torch")  # the caller has it, then
        return torch.cat([x, x.new_zeros(shape)], axis)

    def describe(self) -> dict[str, Any]:
        """That of the full length, and all lengths."""
        return {**self.engines[self.full].describe(), "lengths": list(self.engines)}
