"""How many replicas: a pure function of the work that arrives, a clock and its own state. Imports neither Ray nor NumPy.

The signal is work in 8-bit seconds: samples that arrived (those of refused requests included) times the service time per sample
at the model's smallest ratio. It says how busy the replicas would be if none of them turned its dial, so it stays as it is
when they do. See the package's docstring for why that matters.

Each replica reports the sum since its start, not a rate: what has arrived is then counted exactly once, also while load moves
from old replicas to new ones. (Averages kept by the replicas would, just after one was added, hold both the load that the old
ones have given away and the same load at the new one, and ask for yet another.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdial.serving.control import Scheduler

METRIC = "bitdial_work_8bit"  # the name under which replicas report the signal to Ray's controller
KEPT = 10_000  # replicas of the past whose sums are remembered


@dataclass(frozen=True)
class ScalingSettings:
    """When replicas come and go. Seconds, replicas, shares.

    min_replicas, max_replicas  bounds
    utilization                 share of a replica's 8-bit capacity that is planned for; the rest is room for bursts, and what
                                the dial adds comes on top
    up_delay                    more replicas only if they were needed for so long without a break
    down_delay                  fewer only if fewer were enough for so long, even with `hysteresis` more work
    hysteresis                  share of work, see down_delay
    smoothing                   time constant of the average over the arriving work

    Raises ValueError naming the setting that is out of its range (not bitdial's own class: this module is shipped by value to
    Ray's controller and stands alone).
    """

    min_replicas: int = 1
    max_replicas: int = 1
    utilization: float = 0.7
    up_delay: float = 15.0
    down_delay: float = 300.0
    hysteresis: float = 0.2
    smoothing: float = 15.0

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        check(self.min_replicas >= 1, f"min_replicas must be at least 1, got {self.min_replicas}")
        check(
            self.max_replicas >= self.min_replicas,
            f"max_replicas ({self.max_replicas}) must not be below min_replicas ({self.min_replicas})",
        )
        check(0 < self.utilization <= 1, f"utilization must lie in 0..1, above 0; got {self.utilization}")
        for name in ("up_delay", "down_delay", "hysteresis"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"{name} must not be negative, got {value}")
        check(math.isfinite(self.smoothing) and self.smoothing > 0, f"smoothing must be positive, got {self.smoothing}")
        check(self.hysteresis <= 10, f"hysteresis is a share of the work, got {self.hysteresis}")

    def needed(self, work: float) -> int:
        """Replicas for so many 8-bit seconds per second, within the bounds."""
        wanted = math.ceil(work / self.utilization - 1e-9)
        return min(max(wanted, self.min_replicas), self.max_replicas)


class WorkMeter:
    """A replica's side: 8-bit seconds of work that have arrived since it started.

    The service time is that of a full batch, corrected by what serving has shown: batches of any ratio move the correction
    that is common to all, so a machine that becomes slower is seen even while the dial is up. A table that is wrong by some
    percent at one ratio only may move the signal by as much while the dial stands there; `hysteresis` is larger than that.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._samples = 0

    def read(self, scheduler: Scheduler, samples: int) -> float:
        """Bring the sum up to date. samples: how many have arrived since the start, refused ones included."""
        full = scheduler.full_batch
        self.total += max(0, samples - self._samples) * scheduler.table.latency(scheduler.allowed[0], full) / full
        self._samples = max(samples, self._samples)
        return self.total


def decide(
    now: float, arrived: Mapping[str, float], replicas: int, settings: ScalingSettings, state: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Replicas that there should be, and the state to give next time (JSON-able; start with {}).

    now       seconds on a clock that does not run backwards; if it does, that counts as no time
    arrived   by replica: 8-bit seconds that have arrived there since its start (`WorkMeter`). Empty: nothing is known, and
              nothing changes
    replicas  how many there should be at present (those that are still starting count)
    """
    inside = min(max(replicas, settings.min_replicas), settings.max_replicas)
    if not arrived:
        return inside, {**state, "at": now}
    gap = max(0.0, now - state.get("at", now))
    seen: Mapping[str, float] | None = state.get("seen")
    new_work = 0.0
    if seen is not None:
        # A sum that shrank is that of a replica that started again under its old name.
        new_work = sum(
            total - before if total >= (before := seen.get(id, 0.0)) else total for id, total in arrived.items()
        )
    # The average over an exponential window, of work that arrived evenly since the last look.
    kept = math.exp(-gap / settings.smoothing)
    work = state.get("work", 0.0) * kept + new_work * ((1.0 - kept) / gap if gap > 0 else 1.0 / settings.smoothing)
    # A replica that misses a report must not be taken for a new one when it is back, so those that are gone are kept for long.
    known = {**(seen or {}), **arrived}
    new: dict[str, Any] = {"at": now, "work": work, "seen": dict(list(known.items())[-KEPT:])}
    if inside != replicas:
        return inside, new

    up = settings.needed(work)
    down = settings.needed(work * (1.0 + settings.hysteresis))
    if up > replicas:
        since = min(state.get("short_since", now), now)
        if now - since >= settings.up_delay:
            return up, new
        return replicas, {**new, "short_since": since}
    if down < replicas:
        since = min(state.get("spare_since", now), now)
        most = max(state.get("spare_most", down), down)
        if now - since >= settings.down_delay:
            return most, new  # what was needed at the worst moment of the delay
        return replicas, {**new, "spare_since": since, "spare_most": most}
    return replicas, new


class WorkPolicy:
    """Ray's side of `decide`: what AutoscalingConfig(policy=...) names. Ray makes one per deployment, in its controller, from
    `policy_kwargs` (the fields of ScalingSettings), and calls it several times a second.

    Ray's own delays are not used (`deployment.serve_options` sets them to 0): they take what is wanted at the end of a delay,
    not the most that was wanted during it. Its wall clock is not used either, since that can be set.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = ScalingSettings(**settings)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get(METRIC) or {}
        arrived = {str(replica): float(total) for replica, total in reported.items()}
        return decide(
            time.monotonic(), arrived, int(context.target_num_replicas), self.settings, context.policy_state or {}
        )


def policy_arguments(settings: ScalingSettings) -> dict[str, Any]:
    """Keyword arguments of WorkPolicy for these settings; JSON-able."""
    return asdict(settings)
