"""What a measured accuracy curve says to those who decide by it: server, simulation and reports. No NumPy, no torch.

A curve is rows as `benchmarking.accuracy.evaluate_curve` gives them: "ratio", "accuracy", "agreement", "samples", ...
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SAME_RATIO = 1e-9
USUAL_SAMPLES = 1000  # of an evaluation that does not say on how many images it was made


def at_or_below(ratios: Sequence[float], ratio: float) -> int:
    """Index of the largest of ascending `ratios` at or below `ratio`; -1 if all are larger."""
    return bisect.bisect_right(ratios, ratio + SAME_RATIO) - 1


def column(curve: Iterable[Mapping[str, Any]], ratios: Sequence[float], key: str) -> tuple[float | None, ...]:
    """The curve's shares (0..1) under `key`, one per ratio; None where there is none, or something else (other metrics)."""
    found: dict[int, float] = {}
    for row in curve:
        at, value = _number(row.get("ratio")), _number(row.get(key))
        if at is None or value is None or not 0.0 <= value <= 1.0:
            continue
        found.update((i, value) for i, ratio in enumerate(ratios) if abs(at - ratio) < SAME_RATIO)
    return tuple(found.get(i) for i in range(len(ratios)))


def sample_count(curve: Iterable[Mapping[str, Any]]) -> int | None:
    """How many samples the curve was measured on; None where its rows differ or do not say."""
    counts = {row.get("samples") for row in curve}
    only = counts.pop() if len(counts) == 1 else None
    return only if isinstance(only, int) and not isinstance(only, bool) and only > 0 else None


def non_increasing(shares: Sequence[float | None]) -> tuple[float | None, ...]:
    """Shares (accuracies, agreements) of ascending ratios, made non-increasing: the running minimum from the smallest ratio.

    Extracting more cannot help a network, so that a rise is noise of so many samples; who believes it turns the dial up for
    nothing, or holds a floor that only the highest ratio happens to pass. The running minimum and not a least-squares fit (pool
    adjacent violators): all losses are stated against the smallest ratio, which a fit would raise by the noise of the
    others, and a floor is a promise, so that no ratio may count as better than it was measured. A ratio that was measured too
    low draws down those above it by its error, which errs towards precision. None stays None and hides nothing.
    """
    result: list[float | None] = []
    least = math.inf
    for share in shares:
        least = least if share is None else min(least, share)
        result.append(None if share is None else least)
    return tuple(result)


def losses(
    accuracy: Sequence[float | None], agreement: Sequence[float | None], samples: int | None
) -> tuple[float, ...] | None:
    """Accuracy that each ratio is taken to lose against the smallest, 0..1, non-decreasing; None where it is not known of all.

    It is what the curve made non-increasing loses, and where that is flat, agreement with the smallest ratio (the 8-bit model)
    decides: answers of a share d of n samples changed, so the difference of two accuracies on them has a standard error of at
    most sqrt(d / n) (McNemar), and a smaller loss than that has not been measured. samples: n, or None where unknown.
    """
    known = [a for a in non_increasing(accuracy) if a is not None]
    if len(known) < len(accuracy):
        return None
    result = []
    changed = 0.0
    for own, same in zip(known, agreement, strict=True):
        changed = changed if same is None else max(changed, 1.0 - same)
        result.append(max(known[0] - own, math.sqrt(changed / (samples or USUAL_SAMPLES))))
    first = result[0]
    return tuple(max(0.0, loss - first) for loss in result)


def rises(shares: Sequence[float | None]) -> float:
    """By how much the curve lies above what decisions use, at most; 0 where it never rises."""
    pairs = zip(shares, non_increasing(shares), strict=True)
    return max((a - b for a, b in pairs if a is not None and b is not None), default=0.0)


def rise_remark(shares: Sequence[float | None]) -> str:
    """A sentence for people about a curve that rises; "" where it does not."""
    most = 100.0 * rises(shares)
    if most < 0.005:
        return ""
    return (
        f"The measured accuracy rises by up to {most:.2f} points at higher ratios, which is noise of the samples: decisions (the "
        "server's policies, --min-accuracy, simulations) use the lowest value up to each ratio, and where that is flat, the "
        "agreement with the 8-bit model."
    )


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
