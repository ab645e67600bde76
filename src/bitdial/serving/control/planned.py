"""The default policy: how long a queue each ratio may see, from a Markov decision process, and every deadline checked besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError
from bitdial.serving.control.view import Candidates, View, deadline_slack

MOST_UNITS = 64  # states of a plan; longer queues are counted in larger units
LOADS = 40  # plans per unit of utilization; the load is rounded up, the safe side
STEP = 0.05  # relative change of speed or room at which a new plan is made
MOST_PLANS = 1000  # that are kept

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """candidate[n - 1]: which of the candidate ratios runs when n units wait, the head among them."""

    candidate: tuple[int, ...]

    def of(self, units: int) -> int:
        """Position among the candidates at this length of queue."""
        return self.candidate[min(max(units, 1), len(self.candidate)) - 1]


def make_plan(
    seconds: Sequence[float], losses: Sequence[float], rate: float, requests: int, room: float, late: float
) -> Plan:
    """The policy with the least mean cost per second for Poisson arrivals.

    A semi-Markov decision process: the state is the number of units that wait when the worker is free; running one at ratio r
    takes seconds[r] and costs losses[r]; meanwhile requests arrive, and units that could not be in time even at the top ratio
    cost `late` each. Solved by policy iteration (Howard 1960), a small linear system per step.

    seconds, losses: of one unit, per candidate; seconds fall. rate: units per second. requests: in a unit. room: seconds from a
    request's arrival to the latest end of its batch.
    """
    top, count = seconds[-1], len(seconds)
    # Units that may wait behind a batch that has just begun at ratio r.
    fits = [max(0, math.floor((room - s) / top + 1e-9)) for s in seconds]
    states = max(1, max(fits))
    cost = np.zeros((count, states))
    spent = np.zeros((count, states))
    move = np.zeros((count, states, states))
    for r in range(count):
        chances = _arriving(rate * requests * seconds[r], requests)
        tail = np.append(chances[::-1].cumsum()[::-1], 0.0)  # tail[k]: chance of k or more
        excess = np.append(tail[1:][::-1].cumsum()[::-1], 0.0)  # excess[k]: expected units beyond k
        for n in range(states):  # n units stay behind the one that runs
            free = fits[r] - n  # so many more fit
            if free < 0:
                lost = -free + float(excess[0])
                move[r, n, max(fits[r], 1) - 1] = 1.0
                idle = 1.0 if fits[r] == 0 else 0.0
            else:
                lost = float(excess[min(free, len(excess) - 1)])
                stay = chances[:free]
                after = np.zeros(fits[r] + 1)  # units that wait afterwards
                after[n : n + stay.size] = stay
                after[fits[r]] += tail[min(free, len(tail) - 1)]
                idle = float(after[0])
                move[r, n, : max(fits[r], 1)] = after[1:] if fits[r] else 0.0
                move[r, n, 0] += idle  # idle until the next one comes
            cost[r, n] = losses[r] + late * lost
            spent[r, n] = seconds[r] + idle / (rate * requests)
    chosen, here = np.full(states, count - 1), np.arange(states)
    for _ in range(50):
        system = np.zeros((states + 1, states + 1))
        system[:states, :states] = np.eye(states) - move[chosen, here]
        system[:states, states] = spent[chosen, here]
        system[states, 0] = 1.0  # relative to the value of state 1
        solved = np.linalg.solve(system, np.append(cost[chosen, here], 0.0))
        values, per_second = solved[:states], solved[states]
        total = cost - per_second * spent + move @ values
        better = np.where(total.min(0) < total[chosen, here] - 1e-12, total.argmin(0), chosen)
        if (better == chosen).all():
            break
        chosen = better
    return Plan(tuple(int(c) for c in chosen))


def _arriving(mean: float, requests: int) -> Floats:
    """Chances of 0, 1, 2, ... units when `mean` requests are expected and `requests` make a unit (part of the first is there)."""
    most = math.ceil(mean + 8.0 * math.sqrt(mean) + 10.0)
    counts = np.arange(most + 1)
    logs = counts * math.log(mean) - mean - np.append(0.0, np.log(counts[1:]).cumsum())
    chances: Floats = np.exp(logs)
    chances /= chances.sum()
    if requests == 1:
        return chances
    units = np.zeros(most // requests + 2)
    for begun in range(requests):
        np.add.at(units, (counts + begun) // requests, chances / requests)
    return units


class Planned:
    """The lowest ratio that the plan for the present load allows at this length of queue, and from which every deadline of those
    who wait can still be kept (`deadline_slack`).

    Turning the dial late leaves no room for a burst, turning it early costs accuracy for nothing. Which is worse depends on the
    load, on how much each ratio saves and loses, and on how many requests the bound leaves room for: the plan weighs all of it.
    It takes arrivals as Poisson at the smoothed rate of this moment, so a burst changes the plan at once. What comes after a time
    without work is given the lowest ratio that its deadlines allow, whatever a plan would save.

    late: how many wrong answers a late or lost request counts as. 1 maximizes the answers that are right and in time; more puts
    the bound above accuracy.
    """

    name = "planned"

    def __init__(self, late: float = 1.0) -> None:
        if not (math.isfinite(late) and late > 0):
            raise ConfigError(f"what a late request counts as must be positive, got {late}")
        self.late = late
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._candidates = Candidates()

    def choose(self, view: View) -> int:
        candidates = self._candidates.of(view)
        top = candidates[-1]
        size = max(1, round(view.request_size))
        together = max(1, view.full_batch // size)  # requests of a batch
        room = view.slo - view.overhead
        batch = together * size
        seconds = view.table.latency(top, batch) / view.workers
        load = view.rate * seconds / batch
        limit = deadline_slack(view, top)
        if view.idle:
            return next((i for i in candidates if view.table.safe(i, view.batch) <= limit), top)
        if load >= 1.0 or room <= seconds:
            return top
        requests = together * max(1, math.ceil(room / seconds / MOST_UNITS))
        units = math.ceil(view.queue.samples / (requests * size))
        wanted = self._plan(view, candidates, load, size, together, requests, room).of(units)
        return next((i for i in candidates[wanted:] if view.table.safe(i, view.batch) <= limit), top)

    def _plan(
        self, view: View, candidates: list[int], load: float, size: int, together: int, requests: int, room: float
    ) -> Plan:
        table, top, batch = view.table.table, candidates[-1], together * size
        pace = view.table.latency(top, batch) / table.latency(top, batch)  # this machine now, against the table
        relative = math.floor(math.log(room / pace) / STEP)
        grid = min(max(1, math.ceil(load * LOADS)), LOADS)
        key = (self._candidates.key, grid, size, requests, relative, view.workers)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            # Workers are taken as one that is so much faster; deadlines are checked with the real number.
            scale = requests / together / view.workers
            times = [table.latency(i, batch) * scale for i in candidates]
            rate = min(grid / LOADS, 0.99) / times[-1]
            losses = [table.loss(i) * requests for i in candidates]
            plan = make_plan(times, losses, rate, requests, math.exp(relative * STEP), self.late * requests)
            self._plans[key] = plan
        return plan
