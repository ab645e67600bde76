"""Movement operators as loops with fixed strides: the same bytes as element by element, and taken wherever they exist."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cpu_networks import NETWORKS, quantized
from hypothesis import given
from hypothesis import strategies as st

from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.memory import COPY_AXES, Buffer, copy_loops, offsets_of
from bitdial.engines.views import unit_index
from bitdial.graph.ir import Node

Shape = list[int]


def place(shape: Shape, halo: tuple[int, int] = (0, 0)) -> Buffer:
    """Where the compiler puts an 8-bit value of this shape (batch left out)."""
    if len(shape) == 3:
        return Buffer(shape[1], shape[2], shape[0], True, False, False, halo=halo)
    return Buffer(1, math.prod(shape[:-1]), shape[-1] if shape else 1, False, False, False)


def loops_of(
    op: str, attrs: dict[str, Any], shape: Shape, halos: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
) -> Any:
    """(loops, source offsets, target offsets, index of the source per target element) of a movement operator."""
    node = Node("m", op, ["x"], attrs)
    flat, _ = unit_index([1, *shape], [node], whole=False)
    out = result_shape(op, attrs, shape)
    start, end = offsets_of(place(shape, halos[0])), offsets_of(place(out, halos[1]))
    return copy_loops(flat, start, end, shape, out), start, end, flat


def result_shape(op: str, attrs: dict[str, Any], shape: Shape) -> Shape:
    """The sizes of one sample after the movement, by NumPy."""
    x, axis = np.empty(shape), attrs.get("axis", 0) - 1
    if op == "reshape":
        return [int(n) for n in attrs["shape"][1:]]
    if op == "permute":
        return [shape[a - 1] for a in attrs["axes"][1:]]
    if op == "slice":
        return list(x.take(range(attrs["start"], attrs["stop"], attrs["step"]), axis).shape)
    if op in ("select", "gather"):
        return list(x.take(attrs["index"] if op == "select" else attrs["indices"], axis).shape)
    return list(np.pad(x, attrs["pads"][1:]).shape) if op == "pad" else shape


@st.composite
def movements(draw: st.DrawFn) -> tuple[str, dict[str, Any], Shape]:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    axis = draw(st.integers(1, len(shape)))
    size = shape[axis - 1]
    op = draw(st.sampled_from(["reshape", "permute", "slice", "select", "gather", "roll", "pad"]))
    attrs: dict[str, Any] = {"axis": axis}
    if op == "reshape":
        at = draw(st.integers(0, len(shape) - 1))  # two axes made one, or all of them
        ends = (at, min(at + 2, len(shape))) if draw(st.booleans()) else (0, len(shape))
        attrs = {"shape": [["N", 1], *shape[: ends[0]], math.prod(shape[ends[0] : ends[1]]), *shape[ends[1] :]]}
    elif op == "permute":
        attrs = {"axes": [0, *draw(st.permutations(range(1, len(shape) + 1)))]}
    elif op == "slice":
        start = draw(st.integers(0, size - 1))
        attrs |= {"start": start, "stop": draw(st.integers(start + 1, size)), "step": draw(st.integers(1, 3))}
    elif op == "select":
        attrs |= {"index": draw(st.integers(0, size - 1))}
    elif op == "gather":
        attrs |= {"indices": draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))}
    elif op == "roll":
        attrs = {"shifts": [draw(st.integers(0, size))], "axes": [axis]}
    else:
        pads = [[0, 0] for _ in range(len(shape) + 1)]
        pads[axis] = [draw(st.integers(0, 2)), draw(st.integers(0, 2))]
        attrs = {"pads": pads, "value": 0.0}
    return op, attrs, shape


HALO = st.tuples(st.integers(0, 2), st.integers(0, 2))


@given(movements(), HALO, HALO)
def test_loops_move_the_same_bytes(movement: tuple[str, dict[str, Any], Shape], h0: Any, h1: Any) -> None:
    loops, start, end, flat = loops_of(*movement, (h0, h1))
    if loops is None:
        assert movement[0] in ("gather", "roll", "pad", "reshape", "permute")
        return
    extents, from_, to, first_from, first_to = loops
    assert len(extents) <= COPY_AXES and all(s > 0 or e == 1 for s, e in zip([*from_, *to], extents * 2, strict=True))
    grid = np.indices(extents).reshape(len(extents), math.prod(extents))
    taken = {
        (first_to + int(t), first_from + int(f))
        for t, f in zip(np.array(to, int) @ grid, np.array(from_, int) @ grid, strict=True)
    }
    assert taken == {(int(t), int(f)) for t, f in zip(end, start[flat], strict=True)}


@pytest.mark.parametrize(
    ("op", "attrs", "shape"),
    [
        ("reshape", {"shape": [["N", 1], 512 * 49]}, [512, 7, 7]),  # flatten, across memory orders
        ("reshape", {"shape": [["N", 1], 12, 16, 8]}, [192, 8]),
        ("permute", {"axes": [0, 2, 1, 3, 4]}, [4, 12, 8, 8]),  # channel shuffle
        ("permute", {"axes": [0, 1, 3, 2, 4, 5]}, [8, 7, 8, 7, 96]),  # windows of Swin
        ("slice", {"axis": 2, "start": 1, "stop": 7, "step": 2}, [16, 7, 7]),
        ("select", {"axis": 1, "index": 0}, [197, 192]),
    ],
)
def test_the_usual_moves_are_loops(op: str, attrs: dict[str, Any], shape: Shape) -> None:
    assert loops_of(op, attrs, shape)[0] is not None


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("gather", {"axis": 1, "indices": [2, 0, 1]}),
        ("gather", {"axis": 1, "indices": [1, 1, 1]}),
        ("gather", {"axis": 1, "indices": [2, 1, 0]}),
        ("roll", {"shifts": [1], "axes": [1]}),
        ("pad", {"pads": [[0, 0], [1, 0], [0, 0]], "value": 0.0}),
    ],
)
def test_the_others_are_not(op: str, attrs: dict[str, Any]) -> None:
    assert loops_of(op, attrs, [3, 4])[0] is None


@pytest.mark.skipif(bool(native.missing()), reason="the compiled extension is not built")
def test_flatten_is_a_copy_step() -> None:
    program = quantized(NETWORKS["plain"]())
    engine = CpuEngine(program, kernels="fixed")
    (flatten,) = [n.name for n in program.graph.nodes if n.op == "reshape"]
    assert dict(engine.native.steps())[flatten] == "copy"
