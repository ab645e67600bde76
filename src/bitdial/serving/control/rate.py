"""How much work arrives: exponentially weighted averages over a short and a long time, on any clock."""

from __future__ import annotations

import math


class ArrivalRate:
    """Samples per second that arrive, smoothed.

    short, long: time constants in seconds. The short one sees a burst within a few requests, the long one remembers that
    load is high while a burst pauses. most: samples per second above which rates need not be told apart; an overload beyond it is
    forgotten as quickly as one of that size. Time that runs backwards counts as no time at all.
    """

    def __init__(self, short: float, long: float, most: float = math.inf) -> None:
        self.short, self.long, self.most = short, long, most
        self._fast = self._slow = 0.0
        self._last: float | None = None
        self._begin = 0.0
        self.request_size = 1.0

    def arrived(self, now: float, samples: int) -> None:
        """A request of so many samples came at `now`."""
        if self._last is None:
            self._last = self._begin = now
            self.request_size = float(samples)
        self._decay(now)
        self._fast = min(self._fast + samples / self.short, max(self.most, samples / self.short))
        self._slow = min(self._slow + samples / self.long, max(self.most, samples / self.long))
        self.request_size += 0.05 * (samples - self.request_size)

    def _decay(self, now: float) -> None:
        assert self._last is not None
        gap = now - self._last
        if gap > 0:
            self._fast *= math.exp(-gap / self.short)
            self._slow *= math.exp(-gap / self.long)
            self._last = now

    def _warm(self, seconds: float) -> float:
        """An average that began at zero is too small until it has seen its time constant."""
        assert self._last is not None
        return 1.0 - math.exp(-max(self._last - self._begin, 0.25 * seconds) / seconds)

    def fast(self, now: float) -> float:
        """Samples per second over the short time."""
        if self._last is None:
            return 0.0
        self._decay(now)
        return self._fast / self._warm(self.short)

    def present(self, now: float) -> float:
        """Samples per second to reckon with: the short average, or the long one where that is higher, but at most a quarter more:
        after a burst the dial must come down at once."""
        fast = self.fast(now)
        return max(fast, min(self.slow(now), 1.25 * fast))

    def slow(self, now: float) -> float:
        """Samples per second over the long time."""
        if self._last is None:
            return 0.0
        self._decay(now)
        return self._slow / self._warm(self.long)
