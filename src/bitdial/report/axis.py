"""Ranges of the charts' axes with their ticks, and places of labels that must not touch. No drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A range with ticks. logarithmic: equal factors are equal distances, so that a speedup looks alike everywhere."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0..1 along the axis."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)


def linear_axis(values: Sequence[float], margin: float = 0.08) -> Axis:
    """Around all values, ticks at multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-9):  # all alike
        span = 0.1 * max(abs(high), 1e-9)
    low, high = low - margin * span, high + margin * span
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    around = range(math.floor(low / step), math.ceil(high / step) + 1)
    # Written and read back: 3 * 0.1 is a tick at 0.3.
    ticks = tuple(t for t in (float(f"{k * step:.12g}") for k in around) if low <= t <= high)
    return Axis(low, high, ticks)


def time_axis(values: Sequence[float]) -> Axis:
    """Linear where the values lie within a factor of 4, logarithmic otherwise; from positive values."""
    low, high = min(values), max(values)
    if high <= 4 * low:
        return linear_axis(values)
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = tuple(
            step * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for step in steps
            if low <= step * 10.0**power <= high
        )
        if len(ticks) <= 9:
            break
    return Axis(low, high, ticks, logarithmic=True)


def tick_name(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.6g}"


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """About `count` round numbers within low..high; steps are 1, 2, 2.5 or 5 times a power of ten."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * power for s in (1.0, 2.0, 2.5, 5.0, 10.0) if s * power * count >= span)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(i * step, 10) for i in range(first, last + 1)) or (low,)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed for labels `gap` apart within low..high (order kept)."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    ceiling = high
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    result = [0.0] * len(positions)
    for k, i in enumerate(order):
        result[i] = placed[k]
    return result
