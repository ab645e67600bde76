"""Which values of four axes lie channels last, as images, and which in their own order."""

from __future__ import annotations

from collections.abc import Collection

from bitdial.engines.memory import Unsupported
from bitdial.engines.views import check_samples_stay
from bitdial.graph.operators import MOVEMENT
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Contract,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
)
from bitdial.quantization.program import Program

MUST, ROWS, MAY = 3, 2, 1  # read or written by an operator on images; by one on rows; by one that takes images if need be


def margins(
    program: Program, readers: dict[str, list[Instruction]]
) -> dict[str, tuple[str, tuple[int, int, int, int]]]:
    """Moves that pad images for convolutions alone -> what they pad, and by how much (top, bottom, left, right). No step runs for
    them: the convolutions find the zeros in the margin of the value itself."""
    pads = {}
    for step in program.instructions:
        if not isinstance(step, Move) or step.node.op != "pad" or step.name in program.outputs:
            continue
        around = [tuple(p) for p in step.node.attrs["pads"]]
        fits = len(around) == 4 and around[:2] == [(0, 0), (0, 0)] and min(min(p) for p in around) >= 0
        if fits and all(
            isinstance(r, Contract) and r.window is not None and r.residual is None for r in readers.get(step.name, [])
        ):
            pads[step.name] = step.inputs[0], (*around[2], *around[3])
    return pads


def image_values(program: Program, padded: Collection[str] = ()) -> frozenset[str]:
    """8-bit values of four axes that convolutions, pools and their like read or write, or that such values are added to or
    concatenated with. All others lie in their own order, as linear layers and attention want them. padded: values that
    convolutions read with a margin (see `margins`)."""
    wanted: dict[str, int] = {}
    parent: dict[str, str] = {}

    def root(value: str) -> str:
        while parent.get(value, value) != value:
            value = parent[value]
        return value

    def mark(values: Collection[str | None], kind: int, one: bool) -> None:
        own = [v for v in values if v is not None and v in program.qparams and len(program.types[v].shape) == 4]
        for value in own:
            top = root(value)
            wanted[top] = max(wanted.get(top, 0), kind)
            if one and root(own[0]) != top:
                wanted[root(own[0])] = max(wanted.get(root(own[0]), 0), wanted[top])
                parent[top] = root(own[0])

    for step in program.instructions:
        shapes = {program.types[v].shape for v in (*step.inputs, step.name) if v in program.types}
        if isinstance(step, Contract):
            mark([step.inputs[0]], ROWS if step.window is None else MUST, False)
            mark([step.name, step.residual], ROWS if step.window is None else MUST, True)
        elif isinstance(step, MaxPool) or (isinstance(step, SumPool) and step.axes in (None, (2, 3))):
            mark([*step.inputs, step.name], MUST, isinstance(step, MaxPool))
        elif isinstance(step, MatMul):
            for value in (*step.inputs, step.name):
                mark([value], ROWS, False)
        elif isinstance(step, Lookup):
            mark([*step.inputs, step.name], 0, True)
        elif isinstance(step, (Add, Mul)):
            mark([*step.inputs, step.name], 0 if len(shapes) == 1 else MAY, True)
        elif isinstance(step, Concat):
            mark([*step.inputs, step.name], MAY, True)
    mark(padded, MUST, False)
    known = [v for v in program.qparams if v in program.types and len(program.types[v].shape) == 4]
    return frozenset(v for v in known if wanted.get(root(v), 0) in (MUST, MAY))


def planes(program: Program) -> frozenset[str]:
    """Float values of four axes that convolutions write, or add as a residual."""
    found = set()
    for step in program.instructions:
        if isinstance(step, Contract) and step.window is not None and len(step.window.kernel) == 2:
            found |= {v for v in (step.name, step.residual) if v is not None and v not in program.qparams}
    return frozenset(found)


def turned(program: Program, readers: dict[str, list[Instruction]], images: Collection[str]) -> frozenset[str]:
    """Those of them that are only moved, or quantized to images: kept channels last, so that tokens are made of pixels without
    a copy."""
    residuals = {s.residual for s in program.instructions if isinstance(s, Contract)}

    def only_moved(value: str) -> bool:
        for step in readers.get(value, []):
            if isinstance(step, Quantize) and step.name in images:
                continue
            if not isinstance(step, (Move, Float)) or step.operation not in MOVEMENT:
                return False
            try:
                check_samples_stay(step.as_node(), program.types[value], program.types[step.name])
            except Unsupported:
                return False
        return True

    return frozenset(
        v for v in planes(program) - residuals if v not in program.outputs and only_moved(v)
    )
