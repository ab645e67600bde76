"""What one batch costs and what it is worth, by ratio: measured before serving, corrected while serving."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from bitdial.errors import ConfigError
from bitdial.quantization.curve import at_or_below, losses, non_increasing

FORMAT = "bitdial-service-table"
VERSION = 1
UNKNOWN_LOSS = 0.01  # of a full dial, where accuracy was not measured
DOUBT = 0.001  # the same on top of a measured loss


@dataclass(frozen=True)
class ServiceTable:
    """Seconds of one batch on one worker, and accuracy, for every ratio of a model.

    ratios     ascending, as in the model
    batches    ascending batch sizes in samples, the first is 1
    seconds    [ratio][batch], median seconds of one batch
    accuracy   per ratio the share of right answers as it was measured, 0..1; None where nothing was measured
    about      JSON-able: model, processor, threads, ...; for people
    agreement  per ratio the share of answers that are the smallest ratio's, 0..1, or None; empty: None for all
    samples    how many both were measured on; None where unknown
    ceiling    the highest ratio that keeps the 8-bit model's answers, as quantizing found; None where it did not look

    Decisions use `expected` and `loss`, never the measured values themselves.

    Raises ConfigError for tables that contradict themselves.
    """

    ratios: tuple[float, ...]
    batches: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    accuracy: tuple[float | None, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    agreement: tuple[float | None, ...] = ()
    samples: int | None = None
    ceiling: float | None = None

    def __post_init__(self) -> None:
        def wrong(what: str) -> ConfigError:
            return ConfigError(f"the service table is unusable: {what}; measure it again")

        if not self.ratios or list(self.ratios) != sorted(set(self.ratios)):
            raise wrong("ratios must ascend, without repeats")
        if not all(math.isfinite(r) and 0 <= r <= 1 for r in self.ratios):
            raise wrong("ratios must lie in 0..1")
        if not self.batches or self.batches[0] != 1 or list(self.batches) != sorted(set(self.batches)):
            raise wrong("batch sizes must ascend from 1")
        if len(self.seconds) != len(self.ratios) or any(len(row) != len(self.batches) for row in self.seconds):
            raise wrong("one row of seconds per ratio and one column per batch size are needed")
        if not all(math.isfinite(s) and s > 0 for row in self.seconds for s in row):
            raise wrong("seconds must be positive")
        if len(self.accuracy) != len(self.ratios):
            raise wrong("one accuracy per ratio is needed (null where unknown)")
        object.__setattr__(self, "agreement", self.agreement or (None,) * len(self.ratios))
        if len(self.agreement) != len(self.ratios):
            raise wrong("one agreement per ratio is needed (null where unknown)")
        shares = (*self.accuracy, *self.agreement, self.ceiling)
        if not all(a is None or (math.isfinite(a) and 0 <= a <= 1) for a in shares):
            raise wrong("accuracies, agreements and the ceiling must lie in 0..1")
        if self.samples is not None and self.samples < 1:
            raise wrong("the number of samples must be positive")

    def latency(self, index: int, samples: int) -> float:
        """Seconds of a batch of so many samples at ratio `index`: linear between measured sizes; beyond the largest, in
        proportion to it."""
        batches, row = self.batches, self.seconds[index]
        if samples >= batches[-1]:
            return row[-1] * samples / batches[-1]
        at = bisect.bisect_right(batches, samples)
        if at == 0:
            return row[0]
        low, high = batches[at - 1], batches[at]
        return row[at - 1] + (row[at] - row[at - 1]) * (samples - low) / (high - low)

    def throughput(self, index: int, samples: int) -> float:
        """Samples per second of one worker that runs batches of so many samples without pause."""
        return samples / self.latency(index, samples)

    def at_or_below(self, ratio: float) -> int:
        """Index of the largest ratio at or below `ratio`; -1 if all are larger."""
        return at_or_below(self.ratios, ratio)

    @cached_property
    def expected(self) -> tuple[float | None, ...]:
        """Accuracy per ratio to decide by: as measured, made non-increasing (`quantization.curve`)."""
        return non_increasing(self.accuracy)

    @cached_property
    def _losses(self) -> tuple[float, ...]:
        known = losses(self.accuracy, self.agreement, self.samples)
        if known is None:
            return tuple(UNKNOWN_LOSS * ratio for ratio in self.ratios)
        return tuple(loss + DOUBT * ratio for loss, ratio in zip(known, self.ratios, strict=True))

    def loss(self, index: int) -> float:
        """Accuracy given up against the smallest ratio, in 0..1, as the curve made non-increasing and, where it is flat, the
        agreement with the 8-bit model have it (`quantization.curve.losses`); and a tenth of a point at the full dial besides:
        a ratio that seems to cost nothing must still come down when it is not needed. Where accuracies are unknown a full dial is
        taken to cost one point."""
        return self._losses[index]

    def as_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(text: str | bytes | Mapping[str, Any], name: str = "service table") -> ServiceTable:
        """A table from its JSON. Raises ConfigError that names the file and what is wrong."""
        try:
            data: Any = json.loads(text) if isinstance(text, (str, bytes)) else text
            if not isinstance(data, Mapping) or data.get("format") != FORMAT:
                raise ConfigError(f"{name} is no service table (bitdial serve --save-table writes one)")
            if data.get("version") != VERSION:
                raise ConfigError(f"{name} has version {data.get('version')!r}, this bitdial reads {VERSION}")
            return ServiceTable(
                tuple(_number(r) for r in data["ratios"]),
                tuple(_whole(b) for b in data["batches"]),
                tuple(tuple(_number(s) for s in row) for row in data["seconds"]),
                tuple(None if a is None else _number(a) for a in data["accuracy"]),
                dict(data.get("about") or {}),
                tuple(None if a is None else _number(a) for a in data.get("agreement") or ()),
                None if data.get("samples") is None else _whole(data["samples"]),
                None if data.get("ceiling") is None else _number(data["ceiling"]),
            )
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{name} is unreadable: {type(error).__name__}: {error}") from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value


class CorrectedTable:
    """A service table and what serving has shown: predictions follow a machine that is slower (or faster) than when it was
    measured, because it is shared, hot or busy with the requests themselves.

    One factor for all cells moves fast, one per ratio slowly, so that a ratio that has not run lately is corrected by what
    is common to all. `spread` is the mean absolute relative deviation of the predictions.
    """

    FAST, SLOW = 0.1, 0.05
    LIMITS = (0.25, 8.0)

    def __init__(self, table: ServiceTable) -> None:
        self.table = table
        self.common = 1.0
        self.own = [1.0] * len(table.ratios)
        self.spread = 0.02

    def latency(self, index: int, samples: int) -> float:
        """Expected seconds of a batch, corrected."""
        return self.table.latency(index, samples) * self.common * self.own[index]

    def safe(self, index: int, samples: int) -> float:
        """Seconds that a batch hardly ever exceeds: four mean deviations (about three standard deviations) more than expected."""
        return self.latency(index, samples) * (1.0 + 4.0 * self.spread)

    def observe(self, index: int, samples: int, seconds: float) -> None:
        """Learn from a batch that took `seconds`. Values that are not positive and finite are ignored (clock jumps)."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        expected = self.latency(index, samples)
        error = min(max(seconds / expected, 0.2), 5.0)  # one stalled batch says little about the next
        self.spread += self.SLOW * (abs(error - 1.0) - self.spread)
        low, high = self.LIMITS
        self.common = min(max(self.common * error**self.FAST, low), high)
        self.own[index] = min(max(self.own[index] * error**self.SLOW, 0.5), 2.0)


def useful_ratios(table: ServiceTable, samples: int, allowed: Sequence[int]) -> list[int]:
    """Of the allowed ratio indices, ascending, those on the lower convex hull of (seconds per sample, accuracy lost).

    A ratio above the hull is a bad buy: a mixture of two others gives the same throughput with less loss, and the dial mixes
    at no cost, batch by batch. Ratios that are no faster than a smaller one are left out too.
    """
    points: list[tuple[float, float, int]] = []
    for index in sorted(allowed):
        seconds, loss = table.latency(index, samples), table.loss(index)
        while points and loss <= points[-1][1] and seconds <= points[-1][0] and points[-1][1] > 0:
            points.pop()  # slower and no more accurate than this one
        if points and seconds >= points[-1][0]:
            continue
        while len(points) >= 2:
            (s0, l0, _), (s1, l1, _) = points[-2], points[-1]
            # slope of loss per second saved must grow along the hull
            if (l1 - l0) * (s1 - seconds) <= (loss - l1) * (s0 - s1) + 1e-12:
                break
            points.pop()
        points.append((seconds, loss, index))
    return [index for _, _, index in points]
