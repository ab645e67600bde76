"""Policies: which ratio the next batch runs at. Each is a function of what it is shown, plus a few numbers of its own state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from bitdial.errors import ConfigError
from bitdial.serving.control.planned import Planned
from bitdial.serving.control.table import ServiceTable
from bitdial.serving.control.view import Candidates, Policy, View, at_most, deadline_slack


class Fixed:
    """Always the same ratio (the largest allowed one at or below it): what a server without a dial does."""

    def __init__(self, ratio: float = 0.0) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"a fixed ratio must lie in 0..1, got {ratio}")
        self.ratio = ratio
        self.name = f"fixed:{ratio:g}"

    def top(self, table: ServiceTable, allowed: Sequence[int]) -> int:
        """The one index that it chooses: what could be in time at a higher one is of no use to it."""
        return at_most(allowed, table.at_or_below(self.ratio))

    rest = top

    def choose(self, view: View) -> int:
        return self.top(view.table.table, view.allowed)


class Ladder:
    """A threshold on the length of the queue for every ratio, as autoscalers have: one step up the ladder for every `step` full
    batches that wait behind the next one, and down again only below half of that."""

    name = "ladder"

    def __init__(self, step: float = 1.0) -> None:
        if not step > 0:
            raise ConfigError(f"the ladder's step must be positive, got {step}")
        self.step = step
        self._rung = 0

    def choose(self, view: View) -> int:
        waiting = (view.queue.samples - view.batch) / (max(view.full_batch, view.request_size) * self.step)
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
        slack = view.queue[0].deadline - view.now - view.overhead
        needed = view.rate + view.queue.samples / view.slo
        wanted = view.allowed[-1]
        for index in view.allowed:
            seconds = view.table.safe(index, view.batch)
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
    """The lowest useful ratio from which every deadline can still be kept, with room for those to come.

    A batch at a low ratio is harmless as long as, running at the top ratio from then on, (1) its own requests are in time, (2)
    so is every request that waits behind it, and (3) so are those still to come, whose number is uncertain. So precision is given
    up only when it must be, not when load is high: the slack of all waiting requests is spent first, which costs no accuracy.

    (3): work that arrives within t is taken as rate * t + `risk` standard deviations of a compound Poisson process, sqrt(rate *
    size * t). With c seconds per sample at the top ratio and utilization u = rate * c < 1 the backlog this can build has its
    largest value, risk^2 * c * u * size / (4 * (1 - u)), at a finite t. That much room is kept free; it is exceeded with a
    probability of about exp(-risk^2 / 2) (heavy traffic): 0.2 % at 3.5. At u >= 1 even the top ratio falls behind, and there is
    no reason to run below it.

    `dwell`: seconds before going down again; 0 by default, because turning the dial is free.
    """

    name = "lookahead"

    def __init__(self, risk: float = 3.5, dwell: float = 0.0) -> None:
        if not (risk >= 0 and dwell >= 0):
            raise ConfigError(f"risk and dwell must not be negative, got {risk} and {dwell}")
        self.risk, self.dwell = risk, dwell
        self._candidates = Candidates()
        self._up_at = -math.inf

    def choose(self, view: View) -> int:
        candidates = self._candidates.of(view)
        top = candidates[-1]
        limit = deadline_slack(view, top)
        if not view.idle:
            limit = min(limit, self._room(view, top))
        chosen = next((i for i in candidates if view.table.safe(i, view.batch) <= limit), top)
        if chosen > view.current:
            self._up_at = view.now
        elif chosen < view.current and view.now - self._up_at < self.dwell and view.current in candidates:
            return view.current
        return chosen

    def _room(self, view: View, top: int) -> float:
        """Seconds that the next batch may take with regard to requests still to come."""
        table = view.table
        full = min(view.full_batch, max(view.queue.samples, view.batch))
        seconds = table.latency(top, full) / full / view.workers
        load = view.rate * seconds
        if load >= 1.0:
            return 0.0
        size = max(view.request_size, 1.0)
        reserve = self.risk**2 * seconds * load * size / (4.0 * (1.0 - load))
        behind = max(view.queue.samples - view.batch, 0) * seconds + view.busy / view.workers
        own = table.latency(top, max(1, min(round(size), view.full_batch)))
        return (view.slo - view.overhead - behind - reserve - own) * view.workers


class Scripted:
    """A ratio index for every request by its id, worked out beforehand (an oracle's schedule); the top ratio outside of it.

    indices: of requests first, first + 1, ...
    """

    name = "scripted"

    def __init__(self, indices: Sequence[int], first: int = 0) -> None:
        self.indices, self.first = list(indices), first

    @staticmethod
    def read(path: str) -> Scripted:
        """From a JSON file {"first": ..., "indices": [...]}. Raises ConfigError."""
        try:
            with open(path, "rb") as stream:
                data = json.loads(stream.read(1 << 26))
            first, indices = data["first"], data["indices"]
            if not isinstance(first, int) or not all(isinstance(i, int) and i >= 0 for i in indices):
                raise ValueError("whole numbers are needed")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"the schedule {path} cannot be read: {error}") from error
        return Scripted(indices, first)

    def choose(self, view: View) -> int:
        id = view.queue[0].id - self.first
        wanted = self.indices[id] if 0 <= id < len(self.indices) else view.allowed[-1]
        return at_most(view.allowed, wanted)


POLICIES: dict[str, Callable[..., Policy]] = {
    "planned": Planned,
    "lookahead": LookAhead,
    "slackfit": SlackFit,
    "ladder": Ladder,
    "fixed": Fixed,
}


def make_policy(text: str) -> Policy:
    """A policy from its name and settings: "lookahead", "lookahead:risk=3", "slackfit:dwell=0.5", "ladder:step=2", "fixed:0.5";
    "scripted:FILE" follows a schedule worked out beforehand.

    Raises ConfigError naming what is unknown.
    """
    name, _, rest = text.partition(":")
    if name == Scripted.name and rest:
        return Scripted.read(rest)
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
