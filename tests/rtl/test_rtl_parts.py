"""The combinational parts against Python's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="NO AMARANTH: pip install bitdial[npu]; the NPU's hardware is not tested")
from amaranth.sim import Simulator
from rtl.edges import Extract, Foot
from rtl.element import DualProduct
from rtl.grids import KINDS, Grid
from rtl.variants import QuadProduct


def evaluate(part: Any, inputs: list[Any], output: Any, rows: Any) -> list[int]:
    """Output for every row of input values."""
    results = []
    simulator = Simulator(part)

    async def script(context: Any) -> None:
        for row in rows:
            for signal, value in zip(inputs, row, strict=True):
                context.set(signal, int(value))
            results.append(context.get(output))

    simulator.add_testbench(script)
    simulator.run()
    return results


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def test_product() -> None:
    """8x8 and two 4x4, signed and unsigned activations: corners and random bytes."""
    corners = [0, 1, 7, 8, 15, 0x70, 0x77, 0x7F, 0x80, 0x81, 0x88, 0x8F, 0xF0, 0xF7, 0xF8, 0xFF]
    pairs = [(a, w) for a in corners for w in corners] + np.random.default_rng(0).integers(0, 256, (200, 2)).tolist()
    rows = [(a, w, low, sign) for a, w in pairs for low in (0, 1) for sign in (0, 1)]
    part = DualProduct()

    def value(a: int, w: int, low: int, sign: int) -> int:
        if not low:
            return (signed(a, 8) if sign else a) * signed(w, 8)
        halves = ((a >> s & 15, signed(w >> s & 15, 4)) for s in (0, 4))
        return sum((signed(x, 4) if sign else x) * y for x, y in halves)

    assert evaluate(part, [part.a, part.w, part.low, part.sign], part.product, rows) == [value(*row) for row in rows]


def test_extract_is_the_arithmetic_of_the_design() -> None:
    """Every byte at every shift: rounded half to even, then clamped."""
    part = Extract()
    rows = [(x, shift, sign) for x in range(256) for shift in range(8) for sign in (0, 1)]
    expected = []
    for x, shift, sign in rows:
        value = np.rint((signed(x, 8) if sign else x) / 2.0**shift)
        expected.append(int(np.clip(value, -7, 7) if sign else min(value, 15)) & 15)
    assert evaluate(part, [part.x, part.shift, part.sign], part.low, rows) == expected


def test_foot_shifts_low_sums_only() -> None:
    part = Foot(20)
    rows = [(p, s, low) for p in (0, 1, -1, 7 * 7 * 8, -15 * 7 * 8, 5000) for s in range(15) for low in (0, 1)]
    assert evaluate(part, [part.p, part.shift, part.low], part.shifted, rows) == [p << s if low else p for p, s, low in rows]


def test_product_with_two_bits() -> None:
    """Four 2x2 beside the modes of the dual product."""
    fields = (0, 85, 170, 255)
    pairs = np.random.default_rng(1).integers(0, 256, (300, 2)).tolist() + [(a, w) for a in fields for w in fields]
    rows = [(a, w, low, two, sign) for a, w in pairs for low, two in ((0, 0), (1, 0), (0, 1)) for sign in (0, 1)]
    part = QuadProduct()

    def value(a: int, w: int, low: int, two: int, sign: int) -> int:
        bits = 2 if two else 4 if low else 8
        parts = ((a >> s & (1 << bits) - 1, signed(w >> s & (1 << bits) - 1, bits)) for s in range(0, 8, bits))
        return sum((signed(x, bits) if sign else x) * y for x, y in parts)

    inputs = [part.a, part.w, part.low, part.two, part.sign]
    assert evaluate(part, inputs, part.product, rows) == [value(*row) for row in rows]


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_grids_whose_areas_are_compared_compute_the_same(kind: str, sign: int) -> None:
    """Pixels of every element kind, at extremes too, against NumPy; the dual one low as well."""
    rows, columns, pixels = 4, 3, 6
    rng = np.random.default_rng(sign)
    x = rng.choice([0, 1, 100, 127, 128, 129, 200, 255], (pixels, rows))  # bytes
    w = rng.choice([-128, -127, -1, 0, 5, 127], (rows, columns))
    before = rng.integers(-(1 << 20), 1 << 20, (pixels, columns))
    grid = Grid(kind, rows, columns)
    values = np.where(sign, (x ^ 128) - 128, x)
    lows = [0, 1] if kind == "dual" else [0]

    def weight_bytes(r: int, c: int, low: int) -> int:
        if grid.fast:
            return int(w[2 * r, c]) & 255 | (int(w[2 * r + 1, c]) & 255) << 8
        return (int(w[r, c]) & 15 | (int(w[r, c]) & 15) << 4) if low else int(w[r, c]) & 255

    for low in lows:
        found = np.zeros((pixels, columns), np.int64)

        async def host(context: Any, low: int = low, found: Any = found) -> None:
            for c in range(columns):
                context.set(grid.load[c], grid.rows)
            for r in range(grid.rows):
                for c in range(columns):
                    context.set(grid.load[c], r)
                    context.set(grid.w[c], weight_bytes(r, c, low))
                await context.tick()
            for c in range(columns):
                context.set(grid.load[c], grid.rows)
                if grid.dual:
                    context.set(grid.foot_low[c], low)
                    context.set(grid.foot_shift[c], 3)
                if grid.fast:
                    pairs = sum(int(w[r, c] * w[r + 1, c]) for r in range(0, rows, 2))
                    context.set(grid.pairs[c], pairs)
            for r in range(grid.rows):
                context.set(grid.sign[r], sign)
                if grid.dual:
                    context.set(grid.low[r], low)
                    context.set(grid.shift[r], 4)
            for t in range(pixels + grid.rows + columns + 4):
                for r in range(grid.rows):
                    at = t - r
                    if 0 <= at < pixels:
                        pair = int(x[at, 2 * r]) | int(x[at, 2 * r + 1]) << 8 if grid.fast else int(x[at, r])
                        context.set(grid.x[r], pair | pair << 8 if grid.dual else pair)
                    context.set(grid.swap[r], int(at == 0))
                for c in range(columns):
                    at = t - grid.rows - 2 - c
                    if 0 <= at < pixels:
                        context.set(grid.sums_i[c], int(before[at, c]))
                    if 0 <= at - 1 < pixels:
                        found[at - 1, c] = context.get(grid.sums_o[c])
                await context.tick()

        simulator = Simulator(grid)
        simulator.add_clock(1e-6)
        simulator.add_testbench(host)
        simulator.run()
        narrow = np.clip(np.rint(values / 16), -7 if sign else 0, 7 if sign else 15).astype(int)
        own = ((w & 15) ^ 8) - 8
        wanted = before + ((2 * narrow @ own << 3) if low else values @ w)
        np.testing.assert_array_equal(found, wanted)
