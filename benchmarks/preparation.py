"""What preparing a network costs: seconds and peak memory, with the default search, beside NNCF on the same samples.

Every preparation has a process of its own and the same calibration samples (128 photographs or sentences). EfficientNet-Lite0
and MiniLM-L6 have their published weights, the others random ones. Quantizing is timed from the float network in memory to the
file on disk, without imports. Contestants alternate; the middle one of the repeats (by the clock) is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bitdial.errors import BitdialError, ConfigError
from common import (
    Options,
    Progress,
    machine_caption,
    make_parser,
    note,
    open_results,
    print_table,
    read_options,
    run_command,
)
from machine import describe_machine
from real_networks import NetworkRun, missing_modules
from real_networks_data import NETWORKS, UNTRAINED
from real_networks_rows import CONFIGURATIONS, PEERS
from results import read_rows

ORDER = ("efficientnet_lite0", "mobilenet_v2", "resnet50", "vit_s", "minilm_l6")
MEASURED = {name: (NETWORKS | UNTRAINED)[name] for name in ORDER}
NNCF = next(peer for peer in PEERS if peer.name == "nncf")
DEFAULT = next(configuration for configuration in CONFIGURATIONS if configuration.name == "default")
HEAD = ["network", "bitdial, s", "CPU, s", "peak, MiB", "NNCF, s", "CPU, s", "peak, MiB", "times NNCF's"]


class PreparationRun(NetworkRun):
    """Prepares a network several times with either quantizer."""

    def once(self, contestant: str, progress: Progress) -> dict[str, Any]:
        """Seconds, memory and stages of one preparation."""
        progress(contestant, 0.0)
        if contestant == NNCF.name:
            artifact = self.stem("preparation", NNCF.name + NNCF.suffix)
            worker, info = self.prepare(
                NNCF.adapter, self.options.extra.peer_python, model=str(self.onnx()),
                transformer=self.network.transformer, artifact=str(artifact),
            )  # fmt: skip
        else:
            artifact = self.stem("preparation", "bitdial")
            config = self.config(DEFAULT).model_dump(mode="json")
            worker, info = self.prepare(
                "bitdial_preparation", sys.executable, network=self.network.name, config=config, artifact=str(artifact)
            )
        worker.close()
        cost: dict[str, Any] = info["preparation"]
        return cost

    def costs(self, contestants: Sequence[str], progress: Progress) -> dict[str, Any]:
        """Contestant -> its middle preparation, and the seconds of all."""
        made: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
        for _ in range(self.options.extra.repeats):
            for contestant in contestants:
                made[contestant].append(self.once(contestant, progress))
        chosen = {}
        for contestant, runs in made.items():
            runs.sort(key=lambda run: float(run["wall_seconds"]))
            chosen[contestant] = {**runs[len(runs) // 2], "all_seconds": [run["wall_seconds"] for run in runs]}
        return chosen


def lines(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table, one line a network."""
    made = []
    for name, row in rows.items():
        ours, theirs = row["bitdial"], row.get(NNCF.name)
        factor = f"{ours['wall_seconds'] / theirs['wall_seconds']:.1f}" if theirs else ""
        made.append([name, *_cells(ours), *_cells(theirs), factor])
    return made


def _cells(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return ["", "", ""]
    mark = "~" if cost["provisional"] else ""
    return [f"{mark}{cost['wall_seconds']:.1f}", f"{mark}{cost['cpu_seconds']:.0f}", f"{cost['peak_bytes'] / 2**20:,.0f}"]


def own_options(arguments: Sequence[str] | None = None) -> Options:
    """The command's options. Raises ConfigError."""
    parser = make_parser("preparation", __doc__, tuple(MEASURED), 0)
    parser.add_argument("--calibration", type=int, help="samples (default: 128)")
    parser.add_argument("--repeats", type=int, default=1, help="preparations of each contestant (default: %(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of NNCF (default: this one)")
    parser.add_argument("--table", action="store_true", help="print stored results and stop")
    options = read_options(parser, arguments, tuple(MEASURED))
    for option in ("calibration", "repeats"):
        value = getattr(options.extra, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}; give at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the table. Raises BitdialError."""
    options = own_options(arguments)
    if options.extra.table:
        path = options.results / f"preparation.{describe_machine()['kind']}.json"
        if not path.exists():
            raise BitdialError("there are no results to show yet")
        show(read_rows(path, "preparation"))
        return
    file = open_results(options, "preparation", "preparation")
    contestants = [NNCF.name, "bitdial"]
    if absent := missing_modules(options.extra.peer_python, NNCF.needs):
        note(f"NNCF left out: {', '.join(absent)} not installed (pip install -r benchmarks/requirements-peers.txt)")
        contestants.remove(NNCF.name)
    for name in options.networks:
        if reason := MEASURED[name].missing():
            note(f"NETWORK SKIPPED: {name}: {reason}")
            continue
        run, progress = PreparationRun(MEASURED[name], options), Progress(name)
        settings = {**run.settings(DEFAULT.name), "repeats": options.extra.repeats, "contestants": contestants}
        row = file.find(name, settings, changed=options.changed)
        if row is None:
            row = file.put(name, settings, run.costs(contestants, progress))
        progress.done(f"{row['bitdial']['wall_seconds']:.1f} s")
    show(file.rows)


def show(rows: dict[str, dict[str, Any]]) -> None:
    if not rows:
        raise BitdialError("there are no results to show yet")
    samples = next(iter(rows.values()))["settings"]["calibration"]
    machine = next(iter(rows.values()))["machine"]
    caption = f"{samples} calibration samples; {machine_caption(machine)}. ~: others used more than 5 % of the machine meanwhile."
    print_table("Preparation with the default search", HEAD, lines(rows), caption)


if __name__ == "__main__":
    run_command(main)
