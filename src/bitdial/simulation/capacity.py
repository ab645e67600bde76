"""How many machines are needed: the smallest fleet that keeps an SLO and an accuracy, with a policy and without a dial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bitdial.errors import ConfigError
from bitdial.serving.control import Scheduler, ServiceTable, Settings, make_policy
from bitdial.simulation.fleet import MOST_REPLICAS, Fleet, Load, Noise, simulate
from bitdial.simulation.outcome import Summary, summarize


@dataclass(frozen=True)
class Sizing:
    """attainment: share of all requests answered within the SLO that must be reached. accuracy: request-weighted mean that must
    be reached, 0..1; None: any. most: give up beyond so many replicas."""

    attainment: float = 0.99
    accuracy: float | None = None
    most: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            raise ConfigError(f"the attainment to reach must lie in 0..1, got {self.attainment}")
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise ConfigError(f"the accuracy to reach must lie in 0..1, got {self.accuracy}")
        if not 1 <= self.most <= MOST_REPLICAS:
            raise ConfigError(f"the largest fleet must lie in 1..{MOST_REPLICAS}, got {self.most}")

    def met(self, summary: Summary) -> bool:
        """Whether a run reaches both."""
        accurate = self.accuracy is None or (summary.accuracy is not None and summary.accuracy >= self.accuracy - 1e-12)
        return summary.attainment >= self.attainment and accurate


@dataclass(frozen=True)
class FleetSize:
    """replicas: the smallest fleet found; None: even the largest does not do. tried: {replicas: summary}, ascending."""

    policy: str
    replicas: int | None
    tried: dict[int, Summary]

    @property
    def summary(self) -> Summary:
        """Figures of the fleet found, or of the largest tried."""
        return self.tried[self.replicas if self.replicas is not None else max(self.tried)]

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        tried = [
            {"replicas": count, "attainment": s.attainment, "accuracy": s.accuracy} for count, s in self.tried.items()
        ]
        return {"policy": self.policy, "replicas": self.replicas, **self.summary.as_json(), "tried": tried}


def smallest_fleet(
    table: ServiceTable,
    settings: Settings,
    policy: str,
    load: Load,
    sizing: Sizing,
    fleet: Fleet | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> FleetSize:
    """Bisection over the number of replicas, all runs with the same seed and arrivals.

    It takes for granted that a larger fleet does no worse. That holds but for chance, so beside the border the answer may be
    one off. `fleet.replicas` is ignored. progress: called with the number being tried and the
    share of its run. Raises ConfigError.
    """
    fleet = fleet or Fleet()
    tried: dict[int, Summary] = {}

    def enough(replicas: int) -> bool:
        report = None if progress is None else (lambda share: progress(replicas, share))
        outcome = simulate(
            table, settings, policy, load, replace(fleet, replicas=replicas), noise, seed, progress=report
        )
        tried[replicas] = summarize(outcome, table, settings.slo)
        return sizing.met(tried[replicas])

    high = min(sizing.most, _first_guess(table, settings, policy, load, fleet))
    low = 0  # the largest known to be too few; 0 always is
    while not enough(high):
        low = high
        if high >= sizing.most:
            return FleetSize(policy, None, dict(sorted(tried.items())))
        high = min(sizing.most, max(high + 1, math.ceil(1.25 * high)))
    if low == 0:
        # The guess was enough: go down by growing steps, so that small fleets far below it are not tried one by one.
        step = max(1, high // 16)
        while high > 1 and low == 0:
            below = max(1, high - step)
            if enough(below):
                high, step = below, 2 * step
            else:
                low = below
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return FleetSize(policy, high, dict(sorted(tried.items())))


def _first_guess(table: ServiceTable, settings: Settings, policy: str, load: Load, fleet: Fleet) -> int:
    """Replicas that carry the mean rate at the first allowed ratio at 80 %."""
    scheduler = Scheduler(table, settings, make_policy(policy))
    batch = max(scheduler.full_batch, load.images)
    rate = load.images * load.arrivals.size / max(load.duration, 1e-9)
    carried = fleet.workers * table.throughput(scheduler.allowed[0], batch)
    return max(1, math.ceil(rate / carried / 0.8))


def machines_saved(fixed: FleetSize, policy: FleetSize) -> float | None:
    """Share of the fixed fleet's machines that the policy does without; None where either fleet was not found."""
    if fixed.replicas is None or policy.replicas is None:
        return None
    return 1.0 - policy.replicas / fixed.replicas
