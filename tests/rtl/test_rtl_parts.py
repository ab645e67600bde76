"""The combinational parts against Python's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="NO AMARANTH: pip install bitdial[npu]; the NPU's hardware is not tested")
from amaranth.sim import Simulator
from rtl.edges import Extract, Foot
from rtl.element import DualProduct
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
