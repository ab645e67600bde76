"""Width per layer: the widest low operands that cost about as little time as 4 bits on a target.

An exact kernel is as fast at its widest operands as at its narrowest (design notes, section 4, the second column of the
table), and each bit halves the error. So each layer takes the least error among the widths whose fastest exact mechanism
needs at most `tolerance` times what 4 bits need. Widths are judged by worst-case operands, so that the choice holds
whatever the weights become. Pure functions; NumPy only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.exactness import exact_mechanisms
from bitdial.quantization.latency_table import LatencyTable, LayerShape

BITS = (4, 5, 6, 7)
# Between whole bits: what F(2x2, 3x3) leaves room for (9 * 14 <= 127). Its largest shift, 3, reaches 112 of 127, as 7 does
# with 4. Limits from 8 to 13 reach 64 to 104 and clip the largest weights: on the digits network, everything low at 15-level
# activations, the distance of soft labels was 0.082 with 10 against 0.008 with 7 (measured).
EXTRA_WEIGHT_LIMITS = (14,)


@dataclass(frozen=True)
class LayerWidth:
    """The width of one layer and why.

    amax, wmax      limits of low activations and weights
    mechanism       the fastest that is exact for them
    seconds         its time per sample; `seconds_4bit`: of the fastest mechanism at 4 bits
    estimated_from  key of the measured shape the times were estimated from, None if this one was measured
    """

    amax: int
    wmax: int
    mechanism: str
    seconds: float
    seconds_4bit: float
    estimated_from: str | None

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def candidate_widths(signed: bool) -> list[tuple[int, int]]:
    """Pairs (amax, wmax) from 7 bits down to 4, least error first.

    The error of a product is taken as 1 / amax^2 + 1 / wmax^2: both operands' rounding errors are in proportion to their
    steps, and they add. It leaves out how values are spread and what is clipped, which the candidates share. Of two that are
    equal the one of narrower weights comes first: it takes less to store.
    """
    activations = [low_limit(bits, signed) for bits in BITS]
    weights = [*(low_limit(bits, True) for bits in BITS), *EXTRA_WEIGHT_LIMITS]
    return sorted(((a, w) for a in activations for w in weights), key=lambda pair: (pair[0] ** -2 + pair[1] ** -2, pair[1]))


def choose_width(shape: LayerShape, signed: bool, table: LatencyTable, tolerance: float) -> LayerWidth:
    """The pair of least error whose fastest exact mechanism needs at most `tolerance` (>= 1) times the 4-bit time.

    4 bits themselves always qualify. Where no mechanism is faster than 8 bits, all widths are equally fast and the widest
    comes out: low channels then buy nothing, and cost next to nothing.
    """
    times = table.times(shape)
    bound = (127 if signed else 255) * 127 * shape.depth  # whatever the weights and shifts become

    def fastest(amax: int, wmax: int) -> tuple[str, float]:
        return times.fastest(
            exact_mechanisms(
                amax, wmax, signed, shape.kernel, shape.stride, dilation=shape.dilation, accumulator_bound=bound
            )
        )

    limit = fastest(low_limit(4, signed), low_limit(4, True))[1]
    for amax, wmax in candidate_widths(signed):
        mechanism, seconds = fastest(amax, wmax)
        if seconds <= tolerance * limit:
            return LayerWidth(amax, wmax, mechanism, seconds, limit, times.estimated_from)
    raise AssertionError("4 bits are among the candidates and meet their own time")
