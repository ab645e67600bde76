"""`bitdial simulate`: what a fleet would do under a load, from service times, with the server's own scheduler."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, options
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.simulate_work import Work, replay_decisions
from bitdial.cli.terminal import Terminal, count_name, duration, ratio_name
from bitdial.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bitdial.serving.control import ServiceTable
    from bitdial.simulation import ComparisonRow

MOST_TABLE_BYTES = 16 << 20
_OUTPUT = options.OUTPUT_PANEL


@command
def simulate(
    *,
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TABLE.json|MODEL.bitdial]",
            help="Service times (bitdial serve --save-table writes them), or a model to measure here.",
        ),
    ] = None,
    load: Annotated[Given, options_of("bitdial.cli.arrivals:SimulatedArrivals")],
    samples: Annotated[int, option("--samples --images", "N", "Samples per request.", "Load", min=1)] = 1,
    policy: Annotated[
        str,
        option(
            "--policy", "NAME", "What turns the dial: planned, lookahead, slackfit, ladder, fixed:RATIO, oracle.",
            options.DIAL_PANEL,
        ),
    ] = "planned",
    compare: Annotated[bool, option("--compare", "", "Run all policies beside each other.", options.DIAL_PANEL)] = False,
    dial: Annotated[
        Given,
        options_of(
            "bitdial.serving.server.config:ModelOptions",
            only=("slo_ms", "max_ratio", "min_accuracy", "max_wait_ms", "max_queue", "timeout_ms"),
            told={"min_accuracy": "Nor to a ratio whose accuracy is lower.", "max_queue": "Requests that may wait."},
        ),
    ],
    max_batch: Annotated[
        int | None,
        option(
            "--max-batch", "N", "Samples of the largest batch. Default: one request's, or the table's largest with --samples 1.",
            options.BATCHING_PANEL, min=1,
        ),
    ] = None,
    engine: Annotated[
        Given,
        options_of(
            "bitdial.serving.server.config:ModelOptions",
            only=("engine", "npu_array", "npu_mhz", "npu_bandwidth", "pad_groups"),
            told={"engine": "Of a model: what runs it; npu: times of the NPU's cycle model. Default: cpu where it can."},
        ),
    ],
    replicas: Annotated[str, option("--replicas", "N|auto", "Servers; auto: as few as will do.", "Fleet")] = "1",
    wanted: Annotated[Given, options_of("bitdial.simulation.capacity:Sizing")],
    servers: Annotated[Given, options_of("bitdial.simulation.fleet:Fleet")],
    noise: Annotated[Given, options_of("bitdial.simulation.fleet:Noise")],
    window: Annotated[float, option("--window", "SECONDS", "Of the time series and of --overload.", _OUTPUT)] = 1.0,
    output: Annotated[
        Path | None,
        option("--output -o", "FILE.json", "Write all figures there; a file there is replaced.", _OUTPUT),
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", "FILE.png|.svg", "Draw load, latency, ratio and accuracy over time.", _OUTPUT),
    ] = None,
    record: Annotated[Path | None, option("--record", "FILE", "Record the decisions of the first server.", _OUTPUT)] = None,
    save_schedule: Annotated[
        Path | None, option("--save-schedule", "FILE.json", "Write the oracle's ratio per request there.", _OUTPUT)
    ] = None,
    replay: Annotated[
        Path | None,
        option(
            "--replay", "FILE",
            "Instead: take the decisions of a recording again (bitdial serve --record) and tell the differences.", _OUTPUT,
        ),
    ] = None,
    seed: options.Seed = 0,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Simulate servers under a load, from measured service times and with the controller that `bitdial serve` runs.

    With --replicas auto: the smallest fleet that keeps the SLO with the policy, and with the smallest ratio only. All random
    choices come from --seed; equal arguments give equal figures.
    """
    if replay is not None:
        replay_decisions(terminal, replay)
        return
    if table is None:
        raise ConfigError(
            "give a file of service times (bitdial serve MODEL --save-table FILE writes one), or --replay"
        )
    files.check_outputs(output=output, plot=plot, record=record, save_schedule=save_schedule)
    from bitdial.cli.arrivals import SimulatedArrivals, make_load
    from bitdial.quantization.curve import rise_remark
    from bitdial.serving.control import make_policy
    from bitdial.serving.server.config import make_options
    from bitdial.simulation import Fleet, Load, Noise, Sizing

    times = read_table(table, max_batch or max(samples, 1 if samples > 1 else 32), terminal, engine)
    settings = make_options(**dial, max_batch=max_batch or (samples if samples > 1 else times.batches[-1])).settings()
    automatic = replicas.strip() == "auto"
    fleet = Fleet(**servers, replicas=1 if automatic else parse_replicas(replicas))
    spread = Noise(**noise)
    allowed = settings.allowed(times)
    if policy != "oracle":
        make_policy(policy)
    one = [
        fleet.workers * times.throughput(i, max(samples, settings.max_batch)) / samples for i in (allowed[0], allowed[-1])
    ]
    played = make_load(SimulatedArrivals(**load), window, fleet.replicas * one[0], automatic, seed)
    requests = Load(played.times, samples)
    work = Work(terminal, times, settings, requests, fleet, spread, seed)
    content: dict[str, Any] = {
        "command": "simulate",
        "table": str(table),
        "load": {"text": played.text, "requests": requests.arrivals.size, "seconds": played.seconds, "samples": samples},
        "settings": settings.model_dump(),
        "fleet": {**fleet.model_dump(), "replicas": "auto" if automatic else fleet.replicas},
        "noise": spread.model_dump(),
        "seed": seed,
        "capacity_per_replica": {"smallest_ratio": one[0], "largest_ratio": one[1], "unit": "requests/s"},
    }
    terminal.say(f"load: {played.text}; {count_name(requests.arrivals.size)} requests in {duration(played.seconds)}")
    terminal.say(
        f"one server carries {one[0]:.1f} requests/s at ratio {ratio_name(times.ratios[allowed[0]])}, {one[1]:.1f} at "
        f"{ratio_name(times.ratios[allowed[-1]])} ({one[1] / one[0]:.2f}x)"
    )
    if settings.bound_by(times) == "model file":
        terminal.note("note: the dial stops at the ceiling found when the model was quantized; --max-ratio overrides")
    if remark := rise_remark(times.accuracy):
        terminal.note(f"note: {remark}")
    rows: list[ComparisonRow] = []
    if automatic:
        sizing = Sizing(**wanted)
        content["sizing"] = {**sizing.model_dump(), **work.size(policy, sizing)}
    else:
        rows = work.run(policy, compare, record)
        content["rows"] = [row.as_json() for row in rows]
        content["window_seconds"] = window
        content["series"] = work.series(rows, window)
    from bitdial.report.simulation import simulation_chart

    written = files.write_made(
        (plot, lambda: simulation_chart(work.picture(rows, window, table.stem, played.text))),
        (output, lambda: content), (save_schedule, lambda: json.dumps(work.script(rows))),
    )  # fmt: skip
    for path in written:
        terminal.say(f"wrote {path}")
    terminal.emit(content)


def read_table(path: Path, max_batch: int, terminal: Terminal, engine: Given | None = None) -> ServiceTable:
    """Service times of a JSON file, or of a model measured on this machine (as `bitdial serve` does; remembered for the next
    time), or modelled. engine: settings of `ModelOptions` for a model.
    Raises ConfigError for what is neither, DataError if it cannot be read, BitdialError if the model cannot be run."""
    from bitdial.serving.control import ServiceTable

    if path.suffix.lower() == ".bitdial":
        return asyncio.run(_measure(path, max_batch, terminal, engine or Given()))
    if engine:
        raise ConfigError(f"{', '.join(engine.flags)}: {path} holds service times already; give a MODEL.bitdial")
    try:
        if path.stat().st_size > MOST_TABLE_BYTES:
            raise DataError(f"{path} is too large for a table of service times")
        return ServiceTable.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read the service times {path}: {error.strerror or error}") from error


async def _measure(path: Path, max_batch: int, terminal: Terminal, engine: Given) -> ServiceTable:
    from bitdial.engines.base import engine_spec
    from bitdial.serving.server.config import make_options
    from bitdial.serving.worker.base import WorkerOptions
    from bitdial.serving.worker.calibration import measure_table
    from bitdial.serving.worker.process import ProcessWorker
    from bitdial.serving.worker.thread import ThreadWorker

    made = make_options(**engine)
    options = WorkerOptions(engine=made.engine, engine_options=made.given_engine_options(), max_batch=max_batch)
    modelled = made.engine is not None and engine_spec(made.engine).modelled
    worker = (ThreadWorker if modelled else ProcessWorker)(path, options)  # what is not timed needs no process of its own
    try:
        await worker.start()
        with terminal.progress() as progress:
            return await measure_table(
                worker, max_batch, lambda share, text: progress("measuring service times", share)
            )
    finally:
        await worker.stop()


def parse_replicas(text: str) -> int:
    """A whole number from 1. Raises ConfigError."""
    stripped = text.strip()
    if not (stripped.isascii() and stripped.isdigit() and len(stripped) <= 9 and int(stripped) >= 1):
        raise ConfigError(f"--replicas: '{text}' is neither a whole number from 1 nor auto")
    return int(stripped)
