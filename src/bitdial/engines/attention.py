"""Attention among the instructions of a program, for engines that compute it in one step.

It is recognized before anything is compiled: a product, what is added to it or multiplied with it, softmax, Quantize and the
second product, where nothing else reads what lies in between. An engine leaves those instructions out and compiles one step in
the place of the last; where that proves impossible it compiles them one by one after all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitdial.engines.memory import Unsupported, arguments
from bitdial.engines.views import check_samples_stay, sizes_of
from bitdial.graph.operators import softmax_axis
from bitdial.quantization.instructions import Dequantize, Float, Instruction, MatMul, Quantize
from bitdial.quantization.program import Program

MOST_TERMS = 4


@dataclass(frozen=True)
class Joined:
    """What scores meet. op: "add", "mul", "sub", "div" with `operand`; "fill", "keep": `number` or they stay where `operand`, of
    bool, is true. operand: a value, a constant or a number. shape: of the scores there, for a batch of one."""

    op: str
    operand: str | float
    shape: tuple[int, ...]
    number: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Instructions that become one step in the place of the last. rounding: what makes the queries of dequantized values."""

    scores: MatMul
    joined: tuple[Joined, ...]
    weights: Quantize
    values: MatMul
    rounding: Quantize | None
    parts: tuple[Instruction, ...]  # all of them, in order

    def without_rounding(self) -> Attention:
        """For engines that compile what makes the queries by itself."""
        return replace(self, rounding=None, parts=tuple(p for p in self.parts if p is not self.rounding))

    @property
    def layers(self) -> list[str]:
        return [self.scores.name, self.values.name]


FUSE = True  # off in tests


def find_attention(program: Program, readers: Mapping[str, Sequence[Instruction]]) -> dict[str, Attention]:
    """By the name of the second product."""
    if not FUSE:
        return {}
    finder = _Finder(program, readers)
    found = (finder.attention(step) for step in program.instructions if isinstance(step, MatMul))
    return {a.values.name: a for a in found if a is not None}


class _Finder:
    def __init__(self, program: Program, readers: Mapping[str, Sequence[Instruction]]) -> None:
        self.program, self.readers = program, readers
        self.made = {step.name: step for step in program.instructions}
        self.place = {step.name: i for i, step in enumerate(program.instructions)}

    def _alone(self, value: str, step: Instruction) -> bool:
        """Whether an instruction is all that reads a value."""
        return list(self.readers.get(value, ())) == [step] and value not in self.program.outputs

    def attention(self, step: MatMul) -> Attention | None:
        weights = self.made.get(step.inputs[0])
        if not isinstance(weights, Quantize) or not self._alone(weights.name, step):
            return None
        softmax_ = self.made.get(weights.inputs[0])
        if not isinstance(softmax_, Float) or not self._alone(softmax_.name, weights):
            return None
        axis, rank = softmax_axis(softmax_.node), len(self.program.types[softmax_.name].shape)
        if axis is None or axis % rank != rank - 1 or self.program.qparams[weights.name].signed:
            return None
        source = softmax_.operands()[0]
        found = self._scores(source) if self._alone(source, softmax_) else None
        if found is None:
            return None
        scores, joined, between = found
        if scores.clamp is not None or scores.activation is not None or len(joined) > MOST_TERMS:
            return None
        rounding = self._rounding(scores)
        parts = [scores, *between, softmax_, weights, step, *([] if rounding is None else [rounding])]
        parts.sort(key=lambda s: self.place[s.name])
        return Attention(scores, tuple(joined), weights, step, rounding, tuple(parts))

    def _scores(self, value: str) -> tuple[MatMul, list[Joined], list[Instruction]] | None:
        """(the product that scores come from, what joins them, the instructions behind it, in order), where nothing else reads
        what lies in between."""
        step = self.made.get(value)
        if isinstance(step, MatMul):
            return step, [], []
        if not isinstance(step, Float) or "activation" in step.node.attrs:
            return None
        operands, types = step.operands(), self.program.types
        if step.operation == "reshape":
            found = self._scores(operands[0]) if self._alone(operands[0], step) else None
            if found is None or not _stays(step, self.program):
                return None
            return found[0], found[1], [*found[2], step]
        for whole, joined in _meetings(step, self.program):
            same = whole not in self.program.constants and types[whole].shape == types[value].shape
            found = self._scores(whole) if same and self._alone(whole, step) else None
            if found is not None and sizes_of(types[value])[1] == 0:
                return found[0], [*found[1], joined], [*found[2], step]
        return None

    def _rounding(self, scores: MatMul) -> Quantize | None:
        """The Quantize of queries that are moved and multiplied by numbers in float, between 8-bit values."""
        rounding = self.made.get(scores.inputs[0])
        if not isinstance(rounding, Quantize) or not self._alone(rounding.name, scores):
            return None
        step = self.made.get(rounding.inputs[0])
        while isinstance(step, Float):
            step = self.made.get(next((v for v in step.operands() if v not in self.program.constants), ""))
        return rounding if isinstance(step, Dequantize) else None


def _meetings(step: Float, program: Program) -> list[tuple[str, Joined]]:
    """(what may be scores, what they meet), if an instruction is of the kind that they meet."""
    kind = program.types[step.name]
    shape, args = tuple(sizes_of(kind)[0]), list[Any]()
    if kind.dtype != "float32":
        return []
    if step.operation in ("add", "mul"):
        args, op = list(step.operands()), step.operation
    else:
        found = _ATEN.get(step.operation)
        if found is None:
            return []
        try:
            args, kwargs = arguments(step)
        except Unsupported:
            return []
        op = found
        if kwargs or len(args) != (3 if op in ("fill", "where") else 2):
            return []
    if op in ("fill", "where"):
        x, mask, number = args if op == "fill" else (args[1], args[0], args[2])
        turned = op == "where" and (not isinstance(x, str) or x in program.constants)
        x, number = (number, x) if turned else (x, number)
        if isinstance(number, str) and program.constants.get(number, np.zeros(2)).size == 1:
            number = float(program.constants[number].reshape(()))
        if not isinstance(x, str) or not isinstance(mask, str) or isinstance(number, str):
            return []
        return [(x, Joined("fill" if op == "fill" or turned else "keep", mask, shape, float(number)))]
    a, b = args
    pairs = ((a, b), (b, a)) if op in ("add", "mul") else ((a, b),)
    return [(x, Joined(op, y, shape)) for x, y in pairs if isinstance(x, str) and x != y]


_ATEN = {f"aten.{op}.{kind}": op for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")} | {
    "aten.masked_fill.Scalar": "fill", "aten.masked_fill.Tensor": "fill", "aten.where.self": "where",
    "aten.where.ScalarOther": "where", "aten.where.ScalarSelf": "where",
}  # fmt: skip


def _stays(step: Float, program: Program) -> bool:
    try:
        check_samples_stay(step.node, program.types[step.operands()[0]], program.types[step.name])
    except Unsupported:
        return False
    return True
