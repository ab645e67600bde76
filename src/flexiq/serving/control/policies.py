"""Policies: which ratio the next batch runs at. Each is a function of what it is shown, plus a few numbers of its own state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexiq.errors import ConfigError
from flexiq.serving.control.queue import RequestQueue
from flexiq.serving.control.table import CorrectedTable, useful_ratios

LOOK = 256  # requests of the queue that are looked at one by one; what lies behind them has the same slack or more


@dataclass(slots=True)
class View:
    """What a policy sees at a dispatch. Seconds and images.

    now              the clock
    table            corrected service times
    queue            waiting requests, earliest deadline first, at least one
    batch            images that the next batch will hold
    requests         requests that the next batch will hold
    rate_fast/slow   images per second that arrive, over a short and a long time
    request_size     mean images of a request
    workers          workers of this model
    busy             seconds of work that other workers still have before them, summed
    slo              the server's SLO, seconds
    margin           time that an answer needs around its batch, and room for what predictions miss, seconds
    allowed          ratio indices that the server's own limits allow, ascending
    full_batch       images of a full batch
    current, since   the index in force, and since when
    """

    now: float
    table: CorrectedTable
    queue: RequestQueue
    batch: int
    requests: int
    rate_fast: float
    rate_slow: float
    request_size: float
    workers: int
    busy: float
    slo: float
    margin: float
    allowed: Sequence[int]
    full_batch: int
    current: int
    since: float


class Policy(Protocol):
    """Chooses a ratio index out of `view.allowed`."""

    name: str

    def choose(self, view: View) -> int: ...


class Fixed:
    """Always the same ratio (the largest allowed one at or below it): what a server without a dial does."""

    def __init__(self, ratio: float = 0.0) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"a fixed ratio must lie in 0..1, got {ratio}")
        self.ratio = ratio
        self.name = f"fixed:{ratio:g}"

    def choose(self, view: View) -> int:
        at = view.table.table.at_or_below(self.ratio)
        return max((i for i in view.allowed if i <= at), default=view.allowed[0])


class Ladder:
    """A threshold on the length of the queue for every ratio, as autoscalers have: one step up the ladder for every `step` full
    batches that wait, and down again only below half of that."""

    name = "ladder"

    def __init__(self, step: float = 1.0) -> None:
        if not step > 0:
            raise ConfigError(f"the ladder's step must be positive, got {step}")
        self.step = step
        self._rung = 0

    def choose(self, view: View) -> int:
        waiting = view.queue.images / (view.full_batch * self.step)
        top = len(view.allowed) - 1
        self._rung = min(self._rung, top)
        while self._rung < top and waiting >= self._rung + 1:
            self._rung += 1
        while self._rung > 0 and waiting < 0.5 * self._rung:
            self._rung -= 1
        return view.allowed[self._rung]


class SlackFit:
    """The baseline, after SuperServe's SlackFit: the lowest ratio whose batch meets the oldest deadline and whose throughput
    covers the smoothed arrivals and the backlog (to be worked off within one SLO). Up at once, down after a dwell time."""

    name = "slackfit"

    def __init__(self, dwell: float = 1.0) -> None:
        if not dwell >= 0:
            raise ConfigError(f"the dwell time must not be negative, got {dwell}")
        self.dwell = dwell
        self._low_since = -math.inf

    def choose(self, view: View) -> int:
        slack = view.queue[0].deadline - view.now - view.margin
        needed = max(view.rate_fast, view.rate_slow) + view.queue.images / view.slo
        wanted = view.allowed[-1]
        for index in view.allowed:
            seconds = view.table.latency(index, view.batch)
            full = view.workers * view.full_batch / view.table.latency(index, view.full_batch)
            if seconds <= slack and full >= needed:
                wanted = index
                break
        if wanted >= view.current:
            self._low_since = view.now
            return wanted
        if view.now - self._low_since < self.dwell and view.current in view.allowed:
            return view.current
        return wanted


class LookAhead:
    """The default. The lowest useful ratio from which every deadline can still be kept.

    A batch at a low ratio is harmless as long as, running at the top ratio from then on, (1) its own requests are in time, (2)
    so is every request that waits behind it, and (3) so are those still to come, whose number is uncertain. So precision is given
    up only when it must be, not when load is high: the slack of all waiting requests is spent first, which costs no accuracy.

    (3): work that arrives within t is taken as rate * t + `risk` standard deviations of a compound Poisson process, sqrt(rate *
    size * t). With c seconds per image at the top ratio and utilization u = rate * c < 1 the backlog this can build has its
    largest value, risk^2 * c * u * size / (4 * (1 - u)), at a finite t. That much room is kept free. At u >= 1 even the top
    ratio falls behind, and there is no reason to run below it.

    Only ratios on the convex hull of time and accuracy lost are used (`useful_ratios`), since mixing two batch by batch costs
    nothing. `dwell`: seconds before going down again; 0 by default, because turning the dial is free.
    """

    name = "lookahead"

    def __init__(self, risk: float = 2.0, dwell: float = 0.0) -> None:
        if not (risk >= 0 and dwell >= 0):
            raise ConfigError(f"risk and dwell must not be negative, got {risk} and {dwell}")
        self.risk, self.dwell = risk, dwell
        self._useful: tuple[tuple[Any, ...], list[int]] | None = None
        self._up_at = -math.inf

    def _candidates(self, view: View) -> list[int]:
        key = (id(view.table.table), tuple(view.allowed), view.full_batch)
        if self._useful is None or self._useful[0] != key:
            self._useful = (key, useful_ratios(view.table.table, view.full_batch, view.allowed))
        return self._useful[1]

    def choose(self, view: View) -> int:
        candidates = self._candidates(view)
        top = candidates[-1]
        limit = self.slack(view, top)
        chosen = top
        for index in candidates:
            if view.table.latency(index, view.batch) <= limit:
                chosen = index
                break
        if chosen > view.current:
            self._up_at = view.now
        elif chosen < view.current and view.now - self._up_at < self.dwell and view.current in candidates:
            return view.current
        return chosen

    def slack(self, view: View, top: int) -> float:
        """Seconds that the next batch may take so that all deadlines can be kept at ratio `top` after it; negative where they
        cannot."""
        table, now, margin = view.table, view.now, view.margin
        full = min(view.full_batch, max(view.queue.images, view.batch))
        paces: dict[int, float] = {}  # seconds per image of the whole group of workers, by cap

        def pace(cap: int) -> float:
            index = min(cap, top)
            if index not in paces:
                paces[index] = table.latency(index, full) / full / view.workers
            return paces[index]

        limit = math.inf
        ahead = view.busy / view.workers  # behind the batch: what other workers still do, then the queue
        share = view.workers if view.workers > 1 else 1  # the batch holds up only one of so many workers
        for position, request in enumerate(itertools.islice(view.queue, LOOK)):
            room = request.deadline - now - margin
            if position < view.requests:
                limit = min(limit, room)
            else:
                ahead += request.images * pace(request.cap)
                room = (room - ahead) * share
                # A request that is lost at any ratio must not drive the dial: it is dropped when its turn comes.
                if room > 0:
                    limit = min(limit, room)
        seconds = pace(top)
        rate = max(view.rate_fast, view.rate_slow)
        load = rate * seconds
        if load >= 1.0:
            return 0.0
        size = max(view.request_size, 1.0)
        reserve = self.risk**2 * seconds * load * size / (4.0 * (1.0 - load))
        behind = max(view.queue.images - view.batch, 0) * seconds + view.busy / view.workers
        own = table.latency(top, max(1, min(round(size), view.full_batch)))
        return min(limit, (view.slo - margin - behind - reserve - own) * share)


class Scripted:
    """A ratio index for every request by its id, worked out beforehand (an oracle's schedule); the top ratio beyond its end."""

    name = "scripted"

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)

    def choose(self, view: View) -> int:
        id = view.queue[0].id
        wanted = self.indices[id] if 0 <= id < len(self.indices) else view.allowed[-1]
        return max((i for i in view.allowed if i <= wanted), default=view.allowed[0])


POLICIES: dict[str, Callable[..., Policy]] = {
    "lookahead": LookAhead,
    "slackfit": SlackFit,
    "ladder": Ladder,
    "fixed": Fixed,
}


def make_policy(text: str) -> Policy:
    """A policy from its name and settings: "lookahead", "lookahead:risk=3", "slackfit:dwell=0.5", "ladder:step=2", "fixed:0.5".

    Raises ConfigError naming what is unknown.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"policy '{text}' is unknown: choose one of {sorted(POLICIES)}, as in 'fixed:0.5'")
    settings: dict[str, float] = {}
    try:
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            settings[key.strip() if equals else "ratio"] = float(value if equals else key)
        if not all(math.isfinite(v) for v in settings.values()):
            raise ValueError("not finite")
        return POLICIES[name](**settings)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"policy '{text}' is not understood ({error}): write lookahead:risk=2,dwell=0 or slackfit:dwell=1 or ladder:step=1 "
            "or fixed:0.5"
        ) from error
