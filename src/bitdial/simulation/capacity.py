"""How many machines are needed: the smallest fleet that keeps an SLO and an accuracy, with a policy and without a dial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitdial.serving.control import Scheduler, ServiceTable, Settings, make_policy
from bitdial.settings import BaseConfig, setting
from bitdial.simulation.fleet import MOST_REPLICAS, Fleet, Load, Noise, simulate
from bitdial.simulation.outcome import Summary, summarize


class Sizing(BaseConfig):
    """What a fleet must reach, and where to give up."""

    attainment: float = setting(
        0.99, "With auto: requests to be answered within the SLO.", "SHARE", "Fleet", read="share", gt=0, le=1
    )
    accuracy: float | None = setting(
        None,
        "With auto: accuracy to be reached on average over requests.",
        "SHARE", "Fleet", option="--mean-accuracy", read="share", ge=0, le=1,
    )  # fmt: skip
    most: int = setting(1000, "With auto: the largest fleet to try.", "N", "Fleet", ge=1, le=MOST_REPLICAS)

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
            table, settings, policy, load, fleet.updated(replicas=replicas), noise, seed, progress=report
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
    batch = max(scheduler.full_batch, load.samples)
    rate = load.samples * load.arrivals.size / max(load.duration, 1e-9)
    carried = fleet.workers * table.throughput(scheduler.allowed[0], batch)
    return max(1, math.ceil(rate / carried / 0.8))


def machines_saved(fixed: FleetSize, policy: FleetSize) -> float | None:
    """Share of the fixed fleet's machines that the policy does without; None where either fleet was not found."""
    if fixed.replicas is None or policy.replicas is None:
        return None
    return 1.0 - policy.replicas / fixed.replicas
