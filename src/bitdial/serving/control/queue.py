"""Requests that wait, earliest deadline first."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """What the controller knows of a request. Times in seconds on the caller's clock.

    id        unique among those that wait
    arrival   when it came
    deadline  when its answer should be ready (arrival + SLO)
    drop_at   when its answer is of no use any more; such a request is dropped and never computed
    samples   batch entries in it
    cap       largest ratio index that its sender accepts
    """

    id: int
    arrival: float
    deadline: float
    drop_at: float
    samples: int
    cap: int


class RequestQueue:
    """Waiting requests ordered by deadline, then by arrival of the call. Appending at the end is cheap, as is taking from the
    front: with one SLO for all, nothing else happens."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._keys: list[tuple[float, int]] = []
        self._order = itertools.count()
        self.samples = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, at: int) -> Request:
        return self._requests[at]

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        key = (request.deadline, next(self._order))
        if not self._keys or key > self._keys[-1]:
            self._keys.append(key)
            self._requests.append(request)
        else:
            at = bisect.bisect(self._keys, key)
            self._keys.insert(at, key)
            self._requests.insert(at, request)
        self.samples += request.samples

    def take(self, positions: list[int]) -> list[Request]:
        """Remove the requests at ascending positions and return them in order."""
        taken = [self._requests[at] for at in positions]
        if positions == list(range(len(positions))):
            del self._requests[: len(positions)], self._keys[: len(positions)]
        else:
            for at in reversed(positions):
                del self._requests[at], self._keys[at]
        self.samples -= sum(request.samples for request in taken)
        return taken

    def remove(self, id: int) -> bool:
        """Forget a request whose sender has gone; whether it was there."""
        for at, request in enumerate(self._requests):
            if request.id == id:
                self.take([at])
                return True
        return False

    def oldest_arrival(self) -> float | None:
        """Arrival of the request that has waited longest."""
        return min((request.arrival for request in self._requests), default=None)
