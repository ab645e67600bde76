"""Load balancers: which replica a request goes to. They see only the number of samples outstanding at each replica."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bitdial.errors import ConfigError


class Balancer(Protocol):
    """`pick` is called once per request, `changed` after every change of `load[replica]`."""

    def pick(self) -> int: ...

    def changed(self, replica: int) -> None: ...


class RoundRobin:
    """One after the other, whatever they have to do."""

    def __init__(self, load: Sequence[int], seed: int) -> None:
        self._count, self._next = len(load), 0

    def pick(self) -> int:
        at = self._next
        self._next = at + 1 if at + 1 < self._count else 0
        return at

    def changed(self, replica: int) -> None:
        pass


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher 2001): near the best with hardly any knowledge."""

    BLOCK = 4096

    def __init__(self, load: Sequence[int], seed: int) -> None:
        self._load, self._generator = load, np.random.default_rng([seed, 2])
        self._pairs: list[list[int]] = []

    def pick(self) -> int:
        if not self._pairs:
            self._pairs = self._generator.integers(0, len(self._load), (self.BLOCK, 2)).tolist()
        a, b = self._pairs.pop()
        return b if self._load[b] < self._load[a] else a

    def changed(self, replica: int) -> None:
        pass


class LeastLoaded:
    """The least loaded of all; among equals the one whose load changed longest ago."""

    def __init__(self, load: Sequence[int], seed: int) -> None:
        self._load = load
        self._stamps = list(range(len(load)))
        self._clock = len(load)
        # Entries of replicas that have changed since are skipped when they come up.
        self._heap = [(load[r], r, r) for r in range(len(load))]
        heapq.heapify(self._heap)

    def pick(self) -> int:
        while True:
            _, stamp, replica = self._heap[0]
            if stamp == self._stamps[replica]:
                return replica
            heapq.heappop(self._heap)

    def changed(self, replica: int) -> None:
        self._stamps[replica] = self._clock
        heapq.heappush(self._heap, (self._load[replica], self._clock, replica))
        self._clock += 1


BALANCERS: dict[str, type[RoundRobin] | type[PowerOfTwo] | type[LeastLoaded]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
}


def make_balancer(name: str, load: Sequence[int], seed: int) -> Balancer:
    """A balancer over `load`, the samples outstanding per replica, which the caller keeps. Raises ConfigError."""
    if name not in BALANCERS:
        raise ConfigError(f"load balancer '{name}' is unknown: choose one of {sorted(BALANCERS)}")
    return BALANCERS[name](load, seed)
