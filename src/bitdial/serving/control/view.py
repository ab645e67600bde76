"""What a policy is shown at a dispatch, and what several policies work out of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bitdial.serving.control.queue import RequestQueue
from bitdial.serving.control.table import CorrectedTable, useful_ratios

LOOK = 256  # requests of the queue that are looked at one by one; what lies behind them has the same slack or more


@dataclass(slots=True)
class View:
    """What a policy sees at a dispatch. Seconds and samples.

    now              the clock
    table            corrected service times
    queue            waiting requests, earliest deadline first, at least one
    batch            samples that the next batch will hold
    requests         requests that the next batch will hold
    rate             samples per second that arrive, smoothed
    request_size     mean samples of a request
    workers          workers of this model
    busy             seconds of work that other workers still have before them, summed
    slo              the server's SLO, seconds
    overhead         time that an answer needs after its batch, seconds
    allowed          ratio indices that the server's own limits allow, ascending
    full_batch       samples of a full batch
    current, since   the index in force, and since when
    idle             the batch came after a time without work, and holds all there is: no burst, as far as can be seen
    """

    now: float
    table: CorrectedTable
    queue: RequestQueue
    batch: int
    requests: int
    rate: float
    request_size: float
    workers: int
    busy: float
    slo: float
    overhead: float
    allowed: Sequence[int]
    full_batch: int
    current: int
    since: float
    idle: bool = False


class Policy(Protocol):
    """Chooses a ratio index out of `view.allowed`. One that stays below the last of them may say so in a method `top(table,
    allowed)`, so that requests are refused and dropped by what it can do; one that does not come down to the first of them when
    there is nothing to do says where it rests in a method `rest(table, allowed)`."""

    name: str

    def choose(self, view: View) -> int: ...


def at_most(allowed: Sequence[int], index: int) -> int:
    """The largest allowed ratio index at or below `index`; the smallest one if there is none."""
    return max((i for i in allowed if i <= index), default=allowed[0])


class Candidates:
    """The useful ratios of a view (`useful_ratios`), worked out again only when the table or the limits change."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self._indices: list[int] = []

    def of(self, view: View) -> list[int]:
        """Ratio indices, ascending; the last is the fastest."""
        key = (id(view.table.table), tuple(view.allowed), view.full_batch)
        if self.key != key:
            self.key, self._indices = key, useful_ratios(view.table.table, view.full_batch, view.allowed)
        return self._indices


def deadline_slack(view: View, top: int) -> float:
    """Seconds that the next batch may take so that all who wait can be in time, at ratio index `top` after it."""
    table, now = view.table, view.now
    full = min(view.full_batch, max(view.queue.samples, view.batch))
    paces: dict[int, float] = {}  # seconds per sample of the whole group of workers, by cap
    limit = math.inf
    ahead = view.busy / view.workers  # behind the batch: what other workers still do, then the queue
    for position, request in enumerate(itertools.islice(view.queue, LOOK)):
        room = request.deadline - now - view.overhead
        if position >= view.requests:
            index = min(request.cap, top)
            if index not in paces:
                paces[index] = table.latency(index, full) / full / view.workers
            ahead += request.samples * paces[index]
            room = (room - ahead) * view.workers  # the batch holds up only one of so many workers
            if room <= 0:
                continue  # lost at any ratio: it must not drive the dial, and is dropped when its turn comes
        limit = min(limit, room)
    return limit
