"""Policies beside each other on the same arrivals and tables, with the oracle as the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitdial.errors import ConfigError
from bitdial.serving.control import Policy, Scheduler, ServiceTable, Settings, make_policy
from bitdial.serving.control.policies import Scripted
from bitdial.simulation.fleet import Fleet, Load, Noise, simulate
from bitdial.simulation.oracle import Schedule, best_schedule
from bitdial.simulation.outcome import Outcome, Summary, summarize

POLICIES_COMPARED = ("planned", "lookahead", "slackfit", "ladder", "fixed:0", "fixed:0.5", "fixed:1")
ORACLE = "oracle"


@dataclass(frozen=True)
class ComparisonRow:
    """policy: its text, or "oracle". schedule: the oracle's own."""

    policy: str
    summary: Summary
    outcome: Outcome
    schedule: Schedule | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {"policy": self.policy, **self.summary.as_json()}


def run_policy(
    policy: str,
    table: ServiceTable,
    settings: Settings,
    load: Load,
    fleet: Fleet | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> ComparisonRow:
    """One row: a policy by its text, or "oracle" (see `run_oracle`)."""
    if policy == ORACLE:
        return run_oracle(table, settings, load, fleet, progress)
    outcome = simulate(table, settings, policy, load, fleet, noise, seed, progress=progress)
    return ComparisonRow(policy, summarize(outcome, table, settings.slo), outcome)


def compare(
    table: ServiceTable,
    settings: Settings,
    load: Load,
    policies: Sequence[str] = (*POLICIES_COMPARED, ORACLE),
    fleet: Fleet | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> list[ComparisonRow]:
    """One row per policy, all with the same arrivals, fleet and seed. "oracle" is left out where it is not defined
    (`oracle_reason`). Raises ConfigError."""
    for policy in policies:
        if policy != ORACLE:
            make_policy(policy)  # all errors before any work
    rows = []
    for policy in policies:
        if policy == ORACLE and oracle_reason(table, settings, load, fleet):
            continue
        report = None if progress is None else (lambda share, name=policy: progress(name, share))
        rows.append(run_policy(policy, table, settings, load, fleet, noise, seed, report))
    return rows


def oracle_reason(table: ServiceTable, settings: Settings, load: Load, fleet: Fleet | None = None) -> str:
    """Why there is no oracle for this; "" if there is."""
    fleet = fleet or Fleet()
    if fleet.replicas != 1 or fleet.workers != 1:
        return "the oracle knows one replica with one worker only"
    if Scheduler(table, settings, make_policy("fixed:0")).full_batch > load.samples:
        return f"the oracle runs one request per batch: set the largest batch to {load.samples} samples"
    if load.caps is not None:
        return "the oracle knows no limits of callers"
    if settings.timeout is not None and settings.timeout != settings.slo:
        return "the oracle drops what is late: the timeout must be the SLO"
    return ""


def run_oracle(
    table: ServiceTable,
    settings: Settings,
    load: Load,
    fleet: Fleet | None = None,
    progress: Callable[[float], None] | None = None,
) -> ComparisonRow:
    """The oracle's schedule, run through the same scheduler without noise, since it knows what every batch takes. The server's
    own time counts against every deadline and, on a shared core, against every batch. Raises ConfigError (`oracle_reason`)."""
    fleet = fleet or Fleet()
    reason = oracle_reason(table, settings, load, fleet)
    if reason:
        raise ConfigError(reason)
    allowed = settings.allowed(table)
    own = fleet.overhead if fleet.shared_core else 0.0
    # On a shared core a batch is also held up by requests that arrive while it runs, which the schedule does not know of: the
    # best of several safety margins is what counts.
    best: ComparisonRow | None = None
    for margin in (1.0, 2.0, 4.0, 8.0) if own else (1.0,):
        schedule = best_schedule(
            load.arrivals,
            [table.latency(i, load.samples) + own for i in allowed],
            [table.loss(i) for i in allowed],
            settings.slo - (margin - 1.0 if fleet.shared_core else margin) * fleet.overhead,
        )
        row = _follow(
            schedule, [allowed[at] for at in schedule.script(len(allowed) - 1)], table, settings, load, fleet, progress
        )
        if best is None or _rank(row) > _rank(best):
            best = row
    assert best is not None
    return best


def _rank(row: ComparisonRow) -> tuple[int, float]:
    return row.summary.met, row.summary.accuracy or -(row.summary.mean_ratio or 0.0)


def _follow(
    schedule: Schedule,
    script: list[int],
    table: ServiceTable,
    settings: Settings,
    load: Load,
    fleet: Fleet,
    progress: Callable[[float], None] | None,
) -> ComparisonRow:
    def make() -> Policy:
        return Scripted(script)

    # It has decided what is dropped; the scheduler's estimate of what will be late must not decide again.
    trusting = settings.updated(refuse_late=False, max_wait=0.0)
    outcome = simulate(table, trusting, make, load, fleet, Noise(batch=0.0), 0, progress=progress)
    return ComparisonRow(ORACLE, summarize(outcome, table, settings.slo), outcome, schedule)
