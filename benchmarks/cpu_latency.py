"""Latency of bitdial's CPU engine at every ratio beside PyTorch, ONNX Runtime and OpenVINO, interleaved in one run.

Every contestant is a process of its own; one runs at a time. A cell (network, batch, threads) is measured as a whole, so
that its figures are comparable round by round, and is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitdial.benchmarking.timing import Plan
from bitdial.errors import ConfigError, DataError
from bitdial.processor import usable_cores
from common import RESULTS, ROOT, Progress, data_folder, file_digest, note, print_table, run_command
from machine import describe_machine
from peers.cell import FloatAnswers, measure_cell
from peers.contestants import (
    PEERS,
    Contestant,
    available_isas,
    bitdial_contestant,
    extension_digest,
    measured_peak,
    versions,
)
from peers.memory import measure_memory
from peers.models import ModelFiles
from peers.networks import NETWORKS
from peers.tables import Table, failures, gains_table, latency_table, memory_table, proof_table
from results import ResultFile

BENCHMARK = "cpu_latency"
CACHE = ROOT / "benchmarks" / ".cache"
MEMORY_NETWORK = "resnet50"
SLOW_SECONDS = 4.0  # a case whose call takes longer is repeated less; the table marks it
# oneDNN's name for all of AVX-512 up to bfloat16, that is: everything but AMX.
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}


@dataclass(frozen=True)
class Options:
    """Checked options of the command."""

    networks: tuple[str, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    contestants: tuple[Contestant, ...]
    repeats: int
    seed: int
    files: ModelFiles
    artifacts: Path | None
    environment: dict[str, str]
    portable_batches: tuple[int, ...]
    memory: bool
    given: argparse.Namespace


class GivenArtifacts(ModelFiles):
    """Takes NAME.bitdial of a folder where there is one, instead of building it."""

    given: Path | None = None

    def artifact(self, network: str) -> Path:
        if self.given is not None and (self.given / f"{network}.bitdial").is_file():
            return self.given / f"{network}.bitdial"
        return super().artifact(network)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/cpu_latency.py", description=__doc__)
    add = parser.add_argument
    add("--networks", default=",".join(NETWORKS), help="comma-separated (default: %(default)s)")
    add("--batches", default="1,8,16", help="batch sizes (default: %(default)s)")
    add(
        "--threads",
        default="1,2",
        help="numbers of threads (default: %(default)s; more than there are cores: left out)",
    )
    add(
        "--isa",
        default="all",
        help="instruction sets to force on bitdial: all, none, best, or names (default: %(default)s)",
    )
    add("--peers", default="all", help="all, none, libraries or names, say openvino,onnxruntime/int8 (default: all)")
    add("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order within each round (default: %(default)s)")
    add("--engine", default="cpu", help="bitdial's engine (default: %(default)s)")
    add("--portable-batches", default="1", help="batches of the portable path, which is slow (default: %(default)s)")
    add("--no-amx", action="store_true", help="forbid AMX to the peers that allow it")
    add("--no-memory", action="store_true", help=f"leave out the resident sets of {MEMORY_NETWORK}")
    add("--artifacts", type=Path, help="folder of NAME.bitdial files to use instead of building them")
    add("--cache", type=Path, default=CACHE, help="folder of the models made (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    add("--table", action="store_true", help="print stored rows, measure nothing")
    add("--markdown", action="store_true", help="print stored rows as Markdown, measure nothing")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--changed", action="store_true", help="measure rows of another build of bitdial again")
    again.add_argument("--fresh", action="store_true", help="start over")
    return parser


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Distinct whole numbers of at least 1 from "1,8". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) >= 1 for part in parts):
        raise ConfigError(f"{option}: '{text}' is no list of whole numbers of at least 1; write for example 1,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


def choose_peers(text: str) -> tuple[list[Contestant], dict[str, str]]:
    """(peers asked for that can run, {name: what is missing} of the others). Raises ConfigError for unknown names."""
    if text == "none":
        return [], {}
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    known = {c.name for c in PEERS} | {c.library for c in PEERS}
    unknown = [name for name in wanted if name != "all" and name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"--peers: {', '.join(unknown) or 'nothing'} is not among all, none, {', '.join(sorted(known))}"
        )
    chosen = [c for c in PEERS if "all" in wanted or c.name in wanted or c.library in wanted]
    absent = {c.name: c.missing() for c in chosen if c.missing()}
    return [c for c in chosen if c.name not in absent], absent


def choose_bitdial(text: str, engine: str) -> list[Contestant]:
    """bitdial's contestants, best instruction set first. Raises ConfigError where it cannot run."""
    if text == "none":
        return []
    available = available_isas(engine)
    if not available:
        raise ConfigError(
            f"--engine: bitdial's engine '{engine}' cannot run here; install bitdial with a C++ compiler at hand, or give "
            "--isa none to measure the peers alone"
        )
    if text == "all":
        wanted: list[str | None] = available
    elif text == "best":
        wanted = available[:1]
    else:
        names = [part.strip() for part in text.split(",") if part.strip()]
        wrong = [name for name in names if name not in available]
        if wrong or not names:
            raise ConfigError(f"--isa: {', '.join(wrong) or 'nothing'} is not among {', '.join(map(str, available))}")
        wanted = [isa for isa in available if isa in names]
    return [bitdial_contestant(isa, engine) for isa in wanted]


def read_options(arguments: Sequence[str] | None) -> Options:
    """Parse and check. Raises ConfigError."""
    given = make_parser().parse_args(arguments)
    networks = tuple(dict.fromkeys(n.strip() for n in given.networks.split(",") if n.strip()))
    unknown = [n for n in networks if n not in NETWORKS]
    if unknown or not networks:
        raise ConfigError(f"--networks: {', '.join(unknown) or 'nothing'} is not among {', '.join(NETWORKS)}")
    if given.repeats < 1:
        raise ConfigError(f"--repeats is {given.repeats}; give at least 1")
    if given.artifacts is not None and not given.artifacts.is_dir():
        raise ConfigError(f"--artifacts: {given.artifacts} is no folder; give the folder of .bitdial files")
    threads = parse_numbers(given.threads, "--threads")
    cores = usable_cores()
    for n in threads:
        if n > cores:
            note(f"{n} threads left out: this process may use {cores} cores")
    batches, portable = (
        parse_numbers(given.batches, "--batches"),
        parse_numbers(given.portable_batches, "--portable-batches"),
    )
    printing = given.table or given.markdown
    peers, absent = ([], {}) if printing else choose_peers(given.peers)
    for name, why in absent.items():
        note(f"{name} left out: {why} (pip install -r benchmarks/requirements-peers.txt)")
    own = [] if printing else choose_bitdial(given.isa, given.engine)
    try:
        data: Path | None = data_folder()
    except DataError:
        data = None
        if not printing and any(NETWORKS[n].weights for n in networks):
            note("DATA FOLDER MISSING: the CIFAR networks get random weights; their speed is the same")
    files = GivenArtifacts(given.cache, data, Progress("preparing"))
    files.given = given.artifacts
    return Options(
        networks, batches, tuple(n for n in threads if n <= cores), (*own, *peers), given.repeats, given.seed, files,
        given.artifacts, NO_AMX if given.no_amx else {}, portable, not given.no_memory, given,
    )  # fmt: skip


def cell_contestants(options: Options, batch: int) -> list[Contestant]:
    """The portable path takes part at a few batch sizes only: it takes seconds a call and has no goal to meet."""
    return [
        c
        for c in options.contestants
        if not (c.name == "bitdial/portable" and batch not in options.portable_batches and len(options.contestants) > 1)
    ]


def cell_settings(
    options: Options, contestants: Sequence[Contestant], plan: Plan, network: str, batch: int, threads: int
) -> dict[str, Any]:
    """Everything that a figure of the cell depends on, but bitdial's own code."""
    return {
        "network": network,
        "batch": batch,
        "threads": threads,
        "contestants": {c.name: [c.adapter, c.source, [list(pair) for pair in c.settings]] for c in contestants},
        "versions": versions(contestants),
        "artifact": file_digest(options.files.artifact(network)) if has_bitdial(contestants) else "",
        "plan": {k: v for k, v in asdict(plan).items() if v != float("inf")},
        "environment": options.environment,
    }


def has_bitdial(contestants: Sequence[Contestant]) -> bool:
    return any(c.library == "bitdial" for c in contestants)


def needs_measuring(file: ResultFile, row: dict[str, Any] | None, extension: str, changed: bool) -> bool:
    """changed: rows of another compiled engine or of other package sources count as missing. A row in which bitdial itself
    failed always does; one that a peer failed in is kept, since it would fail again."""
    if row is None or any(name.startswith("bitdial") for name in row.get("failed", {})):
        return True
    return changed and (row.get("extension") != extension or row.get("code") != file.code)


def measure_all(options: Options, file: ResultFile) -> None:
    """Measure the cells that the file lacks; it is written after each."""
    answers = FloatAnswers(options.files.data)
    extension = extension_digest()
    cells = [(n, t, b) for n in options.networks for t in options.threads for b in options.batches]
    for network, threads, batch in cells:
        contestants = cell_contestants(options, batch)
        if not contestants:
            continue
        plan = Plan(
            repeats=options.repeats, seed=options.seed, slow=SLOW_SECONDS, pause=0.005, warmup_calls=3, repetition=0.03
        )
        name = f"{network} batch {batch} threads {threads}"
        settings = cell_settings(options, contestants, plan, network, batch, threads)
        if not needs_measuring(file, file.find(name, settings), extension, options.given.changed):
            continue
        progress = Progress(name)
        started = time.monotonic()
        isas = [dict(c.settings)["isa"] for c in contestants if c.library == "bitdial"]
        peaks = {isa: measured_peak(isa, threads) for isa in isas if isa is not None}
        row = measure_cell(
            contestants, options.files, answers, network, batch, threads, plan, progress, options.environment
        )
        for line in failures([row]):
            note(line)
        file.put(name, settings, {**row, "peaks": peaks, "extension": extension, "seconds": time.monotonic() - started})
        progress.done(f"{len(row['cases'])} cases in {time.monotonic() - started:.0f} s")
    if options.memory and MEMORY_NETWORK in options.networks:
        measure_memory_row(options, file, extension)


def measure_memory_row(options: Options, file: ResultFile, extension: str) -> None:
    contestants = memory_contestants(options)
    if not contestants:
        return
    name = f"{MEMORY_NETWORK} memory"
    settings = {
        "network": MEMORY_NETWORK,
        "contestants": {label: [c.name, extra] for label, c, extra in contestants},
        "versions": versions([c for _, c, _ in contestants]),
        "environment": options.environment,
    }
    if not needs_measuring(file, file.find(name, settings), extension, options.given.changed):
        return
    progress = Progress(name)
    row = measure_memory(contestants, options.files, MEMORY_NETWORK, progress, options.environment)
    for line in failures([row]):
        note(line)
    file.put(name, settings, {**row, "extension": extension})
    progress.done(f"{len(row['processes'])} processes")


def memory_contestants(options: Options) -> list[tuple[str, Contestant, dict[str, Any]]]:
    """bitdial with both settings of `memory`, and the int8 peers; OpenVINO also from its cache of compiled models."""
    found: list[tuple[str, Contestant, dict[str, Any]]] = []
    for c in options.contestants:
        if c.library == "bitdial" and not any(label.startswith("bitdial") for label, _, _ in found):
            if dict(c.settings)["engine"] == "cpu":
                found += [(f"{c.name} memory={m}", c, {"options": {"memory": m}}) for m in ("fast", "small")]
            else:
                found.append((c.name, c, {}))
        elif c.precision == "int8" and c.library != "bitdial":
            found.append((c.name, c, {}))
            if c.library == "openvino":
                cache = options.files.folder / "openvino-cache" / c.name.rpartition(" ")[2]
                found.append((f"{c.name}, compiled model cached", c, {"cache": str(cache.absolute())}))
    return found


def tables(file: ResultFile, options: Options) -> list[Table]:
    """Tables of the stored rows that the options ask for."""
    shown: list[Table] = []
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        for threads in options.threads:
            own = {}
            for batch in options.batches:
                row = file.rows.get(f"{network} batch {batch} threads {threads}")
                if row is not None:
                    own[batch] = row
            if own:
                shown.append(latency_table(network, threads, own))
                rows += own.values()
    if any("ratio" in f for row in rows for f in row["cases"].values()):
        shown.append(gains_table(rows))
    if rows:
        shown.append(proof_table(rows))
    memory = file.rows.get(f"{MEMORY_NETWORK} memory")
    if memory is not None and MEMORY_NETWORK in options.networks:
        shown.append(memory_table(MEMORY_NETWORK, memory))
    return shown


def machine_lines(file: ResultFile) -> list[str]:
    """The processor, and the peaks that bitdial's engine measured on it."""
    machine = file.machine
    lines = [f"{machine['cpu']} ({machine['kind']}), {machine['cores']} cores, {', '.join(machine['features'])}"]
    peaks: dict[tuple[str, int], dict[str, float]] = {}
    for row in file.rows.values():
        for isa, peak in (row.get("peaks") or {}).items():
            if peak is not None:
                peaks[isa, row["settings"]["threads"]] = peak
    for (isa, threads), peak in sorted(peaks.items()):
        figures = ", ".join(f"{value:.1f} {name.replace('_', ' ')}" for name, value in peak.items())
        lines.append(f"measured peak, {isa}, {threads} thread{'' if threads == 1 else 's'}: {figures}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    options = read_options(arguments)
    machine = describe_machine()
    path = options.given.results / f"{BENCHMARK}.{machine['kind']}.json"
    file = ResultFile(path, BENCHMARK, machine, fresh=options.given.fresh)
    if not (options.given.table or options.given.markdown):
        torch.set_num_threads(1)
        measure_all(options, file)
    shown = tables(file, options)
    if not shown:
        note("nothing is stored for these networks, batches and threads")
    for line in machine_lines(file):
        print(line)
    for table in shown:
        if options.given.markdown:
            print(f"\n{table.markdown()}", end="")
        else:
            print_table(table.title, table.columns, table.rows)
    for line in failures([row for row in file.rows.values() if "failed" in row]):
        print(line)
    if any(f.get("repeats", 15) < 15 for row in file.rows.values() for f in row.get("cases", {}).values()):
        print("* fewer than 15 rounds")


if __name__ == "__main__":
    run_command(main)
