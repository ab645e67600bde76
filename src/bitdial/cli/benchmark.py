"""`bitdial benchmark`: latency and throughput of a .bitdial file on this machine, joined with its accuracy curve."""

from __future__ import annotations

import datetime
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bitdial.cli import files, machine, options, reading
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, percent, ratio_name
from bitdial.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from bitdial.benchmarking.latency import LatencyRow
    from bitdial.quantization.program import Program
    from bitdial.report.latency import LatencyReport

MOST_THREADS = 1024
MOST_IMAGES = 1 << 16


@command
def benchmark(
    *,
    model: options.Model,
    engine: Annotated[
        str | None,
        option(
            "--engine", "NAME",
            "What runs the model; see bitdial doctor. Default: cpu where it can run, else reference.",
        ),
    ] = None,
    batch: Annotated[str, option("--batch", "LIST", "Batch sizes, e.g. 1,8.")] = "1",
    threads: Annotated[str, option("--threads", "LIST", "Numbers of threads, e.g. 1,2.")] = "1",
    ratio: Annotated[
        str, option("--ratio", "all|LIST", "Settings of the dial, e.g. 0,50,100 (above 1: percent).")
    ] = "all",
    isa: Annotated[
        str | None, option("--isa", "all|LIST", "Instruction sets to force on the cpu engine. Default: its own choice.")
    ] = None,
    npu: options.Npu,
    repeats: Annotated[int, option("--repeats", "N", "Rounds; each runs every setting once.", min=1)] = 15,
    budget: Annotated[
        float | None, option("--budget", "SECONDS", "Begin no new round after so long (three are run anyway).")
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "--output -o", "FILE.json",
            "Write all figures there as JSON; a file there is replaced.", options.OUTPUT_PANEL,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", "FILE.png|.svg", "Draw accuracy against latency (needs matplotlib).", options.OUTPUT_PANEL),
    ] = None,
    html: Annotated[
        Path | None,
        option("--html", "FILE.html", "Write picture and table as one self-contained page.", options.OUTPUT_PANEL),
    ] = None,
    seed: options.Seed = 0,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Measure latency and throughput by ratio, batch and threads on this machine.

    All settings are measured in turn, round by round, so that drift of the machine hits all alike. Inputs are random; the
    accuracy shown is the curve stored in the file.
    """
    batches = parse_counts(batch, "--batch", MOST_IMAGES)
    thread_counts = parse_counts(threads, "--threads", MOST_THREADS)
    wanted = None if ratio.strip() == "all" else reading.parse_ratios(ratio, "--ratio")
    files.check_outputs(output=output, plot=plot, html=html)
    from bitdial.artifact import load_program
    from bitdial.benchmarking.latency import measure_latency
    from bitdial.benchmarking.timing import Plan
    from bitdial.report.latency import latency_chart
    from bitdial.report.latency_page import render_latency_html

    plan = Plan(repeats=repeats, seed=seed, budget=budget)
    name = choose_engine(engine, terminal)
    isas, more = choose_isas(isa, name), options.npu_options(npu, name)
    program = load_program(model)
    _note_what_differs(terminal, program, thread_counts, wanted)
    with terminal.progress() as progress:
        rows = measure_latency(
            program, name, batches=batches, threads=thread_counts, ratios=wanted, isas=isas, plan=plan, seed=seed,
            progress=progress, options=more,
        )  # fmt: skip
    here = describe_machine()
    content: dict[str, Any] = {
        "command": "benchmark",
        "model": str(model),
        "engine": name,
        "machine": here,
        "settings": {"repeats": repeats, "seed": seed, "budget_seconds": budget, "inputs": "random"},
        "rows": [row.as_json() for row in rows],
    }
    report = latency_report(model.stem, name, here, rows)
    written = files.write_made(
        (output, lambda: content), (plot, lambda: latency_chart(report)), (html, lambda: render_latency_html(report))
    )
    _print(terminal, model.name, name, here, rows)
    for path in written:
        terminal.say(f"wrote {path}")
    content["files"] = [str(path) for path in written]
    terminal.emit(content)


def parse_counts(text: str, option: str, most: int) -> tuple[int, ...]:
    """Ascending, distinct whole numbers of 1 to `most` from "1,8". Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    # Length first: Python refuses to read integers of very many digits.
    if not all(p.isascii() and p.isdigit() and len(p) <= 9 and 1 <= int(p) <= most for p in parts):
        raise ConfigError(f"{option}: '{text}' is no list of whole numbers of 1 to {most}; write for example 1,8")
    return tuple(sorted({int(part) for part in parts}))


def choose_engine(name: str | None, terminal: Terminal) -> str:
    """The engine asked for, or the fastest that can run here."""
    from bitdial.engines.base import engine_specs

    if name is not None:
        return name
    lacking: list[str] = []
    for spec in engine_specs().values():
        if spec.by_name:
            continue
        if not spec.compiled:
            terminal.note(f"note: {'; '.join(lacking)}; the {spec.name} engine is measured: it claims no speed")
            return spec.name
        missing = spec.missing()
        if not missing:
            return spec.name
        lacking.append(f"the {spec.name} engine cannot run ({missing})")
    raise EngineError(f"no engine can be measured here: {'; '.join(lacking)}")


def choose_isas(text: str | None, engine: str) -> list[str | None]:
    """Instruction sets to measure, best first; [None]: the engine's own choice. Raises ConfigError, EngineError."""
    if text is None:
        return [None]
    from bitdial.engines.base import engine_spec

    if "isa" not in engine_spec(engine).options:
        raise ConfigError(f"--isa forces an instruction set on the cpu engine; the engine is '{engine}'")
    try:
        native = importlib.import_module("bitdial.engines.cpu.native")
    except ImportError as error:
        raise EngineError(f"the cpu engine cannot run here: {error}") from None
    known: list[str] = list(native.isas())
    if text.strip() == "all":
        return list(known)
    names = {part.strip() for part in text.split(",")}
    wrong = sorted(names - set(known))
    if wrong:
        raise ConfigError(f"--isa: {', '.join(wrong)} is not among those of this machine: {', '.join(known)}")
    return [name for name in known if name in names]


def describe_machine() -> dict[str, Any]:
    """What belongs beside every figure: processor, instruction sets, cores, system, versions."""
    from bitdial._version import __version__

    return {
        "cpu": machine.cpu_model(),
        "instruction_sets": [name for name, there in machine.instruction_sets().items() if there],
        "usable_cores": machine.usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "bitdial": __version__,
        "torch": sys.modules["torch"].__version__ if "torch" in sys.modules else None,
    }


def latency_report(title: str, engine: str, here: dict[str, Any], rows: Sequence[LatencyRow]) -> LatencyReport:
    """The rows as data of the picture and the page, dated now."""
    from bitdial.report.latency import LatencyPoint, LatencyReport

    points = []
    for row in rows:
        figures = row.as_json()
        points.append(
            LatencyPoint(
                row.ratio, row.batch, row.threads, row.milliseconds, figures["p90_ms"], row.images_per_second,
                figures["speedup"], row.quality.get("accuracy"), row.quality.get("agreement"), row.isa,
            )
        )  # fmt: skip
    return LatencyReport(
        title,
        machine_line(engine, here, rows),
        tuple(points),
        {
            "Processor": here["cpu"],
            "Instruction sets": ", ".join(here["instruction_sets"]) or "not known",
            "Usable cores": str(here["usable_cores"]),
            "Engine": engine,
            "bitdial": here["bitdial"],
            "Rounds": str(min(row.samples.repeats for row in rows)),
            "Inputs": "random; accuracy is the curve stored in the model",
        },
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def machine_line(engine: str, here: dict[str, Any], rows: Sequence[LatencyRow]) -> str:
    """Processor, engine, instruction set used, threads."""
    isas = ", ".join(dict.fromkeys(row.isa for row in rows if row.isa))
    threads = sorted({row.threads for row in rows})
    counted = f"{', '.join(map(str, threads))} thread{'' if threads == [1] else 's'}"
    return ", ".join(part for part in (here["cpu"], f"engine {engine}", isas, counted) if part)


def _note_what_differs(
    terminal: Terminal, program: Program, threads: Sequence[int], wanted: Sequence[float] | None
) -> None:
    from bitdial.cli.measure import table_ratios

    cores = machine.usable_cores()
    if max(threads) > cores:
        terminal.note(f"note: {max(threads)} threads on {cores} usable cores: they wait for each other")
    if wanted is not None and list(wanted) != table_ratios(program, wanted):
        have = ", ".join(f"{100 * r:.4g}" for r in program.ratios)
        terminal.note(f"note: the model has the ratios {have} %; the nearest at or below those asked for are used")
    if not any(row.get("accuracy") is not None for row in program.curve):
        terminal.note(
            "note: the model holds no accuracy curve; quantize it with labelled data to have one beside latency"
        )


def _print(terminal: Terminal, model: str, engine: str, here: dict[str, Any], rows: Sequence[LatencyRow]) -> None:
    several = len({row.isa for row in rows}) > 1
    columns = ["batch", "threads", *(["instructions"] if several else []), "ratio", "median, ms", "p90, ms", "images/s"]
    columns += ["speed", "accuracy", "low multiplies"]
    lines = []
    for row in rows:
        figures = row.as_json()
        executed = row.low_share if row.executed_low is None else row.executed_low
        lines.append(
            [
                str(row.batch), str(row.threads), *([row.isa or "-"] if several else []), ratio_name(row.ratio),
                f"{row.milliseconds:.3f}", f"{figures['p90_ms']:.3f}", f"{row.images_per_second:.1f}",
                "-" if figures["speedup"] is None else f"{figures['speedup']:.2f}x",
                percent(row.quality.get("accuracy")), percent(executed, 1),
            ]
        )  # fmt: skip
    terminal.table(columns, lines, f"{model} on {here['cpu']}", left=0)
    terminal.say(machine_line(engine, here, rows))
    terminal.say(
        f"{min(row.samples.repeats for row in rows)} rounds, all settings in turn; the median is over rounds, speed is "
        "against the smallest ratio in the same rounds"
    )
    if rows[0].executed_low is None:
        terminal.say("low multiplies are the plan's: this engine does not count what it executes")
