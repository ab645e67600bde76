"""What `bitdial simulate` does once its options are read: arrivals, runs, fleet sizes, files."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitdial.cli.terminal import Terminal, count_name, percent, ratio_name
from bitdial.errors import ConfigError, DataError, OutputError
from bitdial.files import remedy

if TYPE_CHECKING:
    from bitdial.report.simulation import SimulationReport
    from bitdial.serving.control import ServiceTable, Settings
    from bitdial.simulation import ComparisonRow, Fleet, FleetSize, Load, Noise, Sizing

MOST_RECORDING_BYTES = 4 << 30
_Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Work:
    """What the options fix, and what is done with it."""

    terminal: Terminal
    table: ServiceTable
    settings: Settings
    load: Load
    fleet: Fleet
    noise: Noise
    seed: int

    def run(self, policy: str, compare: bool, record: Path | None) -> list[ComparisonRow]:
        """Simulate one policy or all, and print the figures."""
        from bitdial.simulation import POLICIES_COMPARED
        from bitdial.simulation.comparison import ORACLE, oracle_reason, run_policy

        names = list(dict.fromkeys([policy, *POLICIES_COMPARED, ORACLE])) if compare else [policy]
        reason = oracle_reason(self.table, self.settings, self.load, self.fleet)
        if compare and reason:
            self.terminal.note(f"note: no oracle: {reason}")
            names = [name for name in names if name != ORACLE]
        if record is not None and compare:
            raise ConfigError("--record records one policy; leave --compare out")
        rows = []
        begun = time.perf_counter()
        with self.terminal.progress() as progress:
            for name in names:
                report = functools.partial(progress, name)
                if record is not None:
                    rows.append(self._recorded(name, record, report))
                    continue
                rows.append(
                    run_policy(name, self.table, self.settings, self.load, self.fleet, self.noise, self.seed, report)
                )  # fmt: skip
        took = time.perf_counter() - begun
        self._print(rows)
        events = sum(row.outcome.events for row in rows)
        self.terminal.say(
            f"{count_name(events)} events in {took:.2f} s: {count_name(events / max(took, 1e-9))} a second"
        )
        return rows

    def _recorded(self, policy: str, path: Path, progress: Callable[[float], None]) -> ComparisonRow:
        from bitdial.serving.control import Recorder
        from bitdial.simulation import ComparisonRow, simulate, summarize

        if policy == "oracle":
            raise ConfigError("the oracle's schedule is no policy that a recording could name; record another")
        try:
            with path.open("w", encoding="utf-8") as stream:
                recorder = Recorder(stream, self.table, self.settings, policy, self.fleet.workers)
                outcome = simulate(
                    self.table, self.settings, policy, self.load, self.fleet, self.noise, self.seed,
                    observer=lambda replica: recorder if replica == 0 else None, progress=progress,
                )  # fmt: skip
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy(error)}") from error
        if recorder.error:
            raise OutputError(f"the recording {path} is not complete: {recorder.error}")
        return ComparisonRow(policy, summarize(outcome, self.table, self.settings.slo), outcome)

    def _print(self, rows: Sequence[ComparisonRow]) -> None:
        columns = [
            "policy",
            "in time",
            "p50, ms",
            "p90, ms",
            "p99, ms",
            "accuracy",
            "ratio",
            "turns/min",
            "late",
            "shed",
        ]
        lines = []
        for row in rows:
            s = row.summary
            ms = ["-" if v is None else f"{1e3 * v:.1f}" for v in (s.p50, s.p90, s.p99)]
            lines.append(
                [
                    row.policy, percent(s.attainment), *ms, percent(s.accuracy),
                    "-" if s.mean_ratio is None else percent(s.mean_ratio, 1), f"{s.switches:.0f}", str(s.late),
                    str(s.shed + s.expired), percent(s.utilisation, 0),
                ]
            )  # fmt: skip
        title = f"{self.fleet.replicas} x {self.fleet.workers} engines, SLO {1e3 * self.settings.slo:g} ms"
        self.terminal.table([*columns, "busy"], lines, title)

    def size(self, policy: str, sizing: Sizing) -> dict[str, Any]:
        """The smallest fleets with the policy and with the smallest ratio only."""
        from bitdial.simulation import machines_saved, smallest_fleet

        names = list(dict.fromkeys(["fixed:0", policy]))
        sizes: list[FleetSize] = []
        for name in names:
            with self.terminal.progress() as progress:

                def report(replicas: int, share: float, name: str = name, show: _Progress = progress) -> None:
                    show(f"{name}, {replicas} servers", share)

                sizes.append(
                    smallest_fleet(
                        self.table, self.settings, name, self.load, sizing, self.fleet, self.noise, self.seed, report
                    )
                )  # fmt: skip
        lines = []
        for size in sizes:
            s = size.summary
            count = str(size.replicas) if size.replicas is not None else f"more than {max(size.tried)}"
            lines.append([size.policy, count, percent(s.attainment), percent(s.accuracy), percent(s.utilisation, 0)])
        wanted = f"{percent(sizing.attainment, 1)} within {1e3 * self.settings.slo:g} ms"
        if sizing.accuracy is not None:
            wanted += f", accuracy of {percent(sizing.accuracy)} on average"
        self.terminal.table(
            ["policy", "servers", "in time", "accuracy", "busy"], lines, f"smallest fleets for {wanted}"
        )
        saved = machines_saved(sizes[0], sizes[-1]) if len(sizes) > 1 else None
        if saved is not None:
            self.terminal.say(
                f"the dial does with {100 * saved:.0f} % fewer machines" if saved > 0 else "the dial saves none"
            )
        return {"fleets": [size.as_json() for size in sizes], "machines_saved": saved}

    def script(self, rows: Sequence[ComparisonRow]) -> dict[str, Any]:
        """The oracle's schedule as a server's scripted policy reads it."""
        schedule = next((row.schedule for row in rows if row.schedule is not None), None)
        if schedule is None:
            raise ConfigError("--save-schedule writes the oracle's schedule: add --policy oracle or --compare")
        allowed = self.settings.allowed(self.table)
        return {"first": 0, "indices": [allowed[at] for at in schedule.script(len(allowed) - 1)]}

    def series(self, rows: Sequence[ComparisonRow], window: float) -> dict[str, Any]:
        """Time series of all rows, JSON-able."""
        from bitdial.simulation import time_series

        return {
            row.policy: [asdict(s) for s in time_series(row.outcome, self.table, self.settings.slo, window)]
            for row in rows
        }

    def picture(self, rows: Sequence[ComparisonRow], window: float, title: str, told: str) -> SimulationReport:
        """The data of the plot."""
        from bitdial.report.simulation import SimulationReport
        from bitdial.simulation import time_series

        if not rows:
            raise ConfigError("--plot draws runs over time; give a number of replicas instead of auto")
        series = {row.policy: time_series(row.outcome, self.table, self.settings.slo, window) for row in rows}
        ratios = self.settings.allowed(self.table)
        samples, machines = self.load.samples, self.fleet.replicas * self.fleet.workers
        capacities = {
            f"capacity at {ratio_name(self.table.ratios[i])}": machines
            * self.table.throughput(i, max(samples, self.settings.max_batch))
            / samples
            for i in dict.fromkeys((ratios[0], ratios[-1]))
        }
        return SimulationReport(f"{title}  ·  {told}", window, self.settings.slo, dict(series), capacities)


def replay_decisions(terminal: Terminal, path: Path) -> None:
    """Print the decisions that come out differently; exit code 1 if there are any."""
    from bitdial.serving.control import replay

    try:
        if path.stat().st_size > MOST_RECORDING_BYTES:
            raise DataError(f"{path} is too large to be replayed; cut it after whole lines")
        with path.open(encoding="utf-8") as stream:
            differences = replay(stream)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the recording {path}: {error}") from error
    for line in differences[:100]:
        terminal.say(line)
    if len(differences) > 100:
        terminal.say(f"... and {len(differences) - 100} more")
    terminal.say(f"{len(differences)} decisions differ" if differences else "all decisions come out the same")
    terminal.emit({"command": "simulate", "recording": str(path), "differences": differences})
    if differences:
        raise typer.Exit(1)
