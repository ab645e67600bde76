"""`bitdial simulate`: what a fleet would do under a load, from service times, with the server's own scheduler."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, options, reading
from bitdial.cli.simulate_work import Work, make_load, replay_decisions, write_outputs
from bitdial.cli.terminal import Terminal, count_name, duration, ratio_name
from bitdial.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bitdial.serving.control import ServiceTable
    from bitdial.simulation import ComparisonRow

MOST_TABLE_BYTES = 16 << 20
_LOAD, _FLEET = "Load", "Fleet"
_DIAL, _BATCH, _OUTPUT = options.DIAL_PANEL, options.BATCHING_PANEL, options.OUTPUT_PANEL


def simulate(
    table: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TABLE.json|MODEL.bitdial]", show_default=False,
            help="Service times (bitdial serve --save-table writes them), or a model to measure here.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE.csv", help="Arrival times in seconds, column arrival_s.", rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    poisson: Annotated[
        float | None,
        typer.Option(
            "--poisson", metavar="RATE", help="Random arrivals, so many requests/s.", rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step", metavar="RATE:TIME,...", help="Random arrivals in steps, e.g. 20:10s,80:10s,20:10s.",
            rich_help_panel=_LOAD, show_default=False,
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            "--duration", metavar="TIME", help="Of --poisson (default: 60s), or of the trace as played.",
            rich_help_panel=_LOAD, show_default=False,
        ),
    ] = None,
    speed: Annotated[
        float, typer.Option("--speed", metavar="FACTOR", help="Play the trace so much faster.", rich_help_panel=_LOAD)
    ] = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", metavar="RATE", help="Scale the trace to so many requests/s, at its own speed.",
            rich_help_panel=_LOAD, show_default=False,
        ),
    ] = None,
    overload: Annotated[
        str | None,
        typer.Option(
            "--overload", metavar="SHARE", help="Play the trace so fast that the fleet at the smallest ratio is overloaded "
            "in this share of the windows, e.g. 20%.", rich_help_panel=_LOAD, show_default=False,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=1, help="Images per request.", rich_help_panel=_LOAD)
    ] = 1,
    slo_ms: Annotated[
        float, typer.Option("--slo-ms", metavar="MS", help="An answer should be ready so soon.", rich_help_panel=_DIAL)
    ] = 100.0,
    policy: Annotated[
        str,
        typer.Option(
            "--policy", metavar="NAME", help="What turns the dial: planned, lookahead, slackfit, ladder, fixed:RATIO, oracle.",
            rich_help_panel=_DIAL,
        ),
    ] = "planned",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run all policies beside each other.", rich_help_panel=_DIAL)
    ] = False,
    max_ratio: options.MaxRatio = None,
    min_accuracy: Annotated[
        str | None,
        typer.Option(
            "--min-accuracy", metavar="SHARE", help="Nor to a ratio whose expected accuracy is lower.", rich_help_panel=_DIAL,
            show_default=False,
        ),
    ] = None,
    replicas: Annotated[
        str,
        typer.Option("--replicas", metavar="N|auto", help="Servers; auto: as few as will do.", rich_help_panel=_FLEET),
    ] = "1",
    attainment: Annotated[
        str,
        typer.Option(
            "--attainment", metavar="SHARE", help="With auto: requests to be answered within the SLO.", rich_help_panel=_FLEET
        ),
    ] = "0.99",
    mean_accuracy: Annotated[
        str | None,
        typer.Option(
            "--mean-accuracy", metavar="SHARE", help="With auto: accuracy to be reached on average over requests.",
            rich_help_panel=_FLEET, show_default=False,
        ),
    ] = None,
    most: Annotated[
        int, typer.Option("--most", metavar="N", min=1, help="With auto: the largest fleet to try.", rich_help_panel=_FLEET)
    ] = 1000,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, help="Engines of one server.", rich_help_panel=_FLEET)
    ] = 1,
    balancer: Annotated[
        str,
        typer.Option(
            "--balancer", metavar="NAME", help="round-robin, least-loaded or power-of-two.", rich_help_panel=_FLEET
        ),
    ] = "power-of-two",
    overhead_ms: Annotated[
        float,
        typer.Option("--overhead-ms", metavar="MS", help="The server's own time per request.", rich_help_panel=_FLEET),
    ] = 0.0,
    shared_core: Annotated[
        bool,
        typer.Option("--shared-core", help="Server and engine share a core: it delays batches too.", rich_help_panel=_FLEET),
    ] = False,
    noise: Annotated[
        float,
        typer.Option("--noise", metavar="SIGMA", help="Spread of batch times (of their logarithm).", rich_help_panel=_FLEET),
    ] = 0.03,
    replica_noise: Annotated[
        float, typer.Option("--replica-noise", metavar="SIGMA", help="The same between servers.", rich_help_panel=_FLEET)
    ] = 0.0,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch", metavar="N", min=1, help="Images of the largest batch. Default: one request's, or the table's "
            "largest with --images 1.", rich_help_panel=_BATCH, show_default=False,
        ),
    ] = None,
    max_wait_ms: Annotated[
        float,
        typer.Option("--max-wait-ms", metavar="MS", help="How long a batch that is not full waits.", rich_help_panel=_BATCH),
    ] = 0.0,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", min=1, help="Requests that may wait.", rich_help_panel=_BATCH)
    ] = 1024,
    timeout_ms: options.TimeoutMs = None,
    window: Annotated[
        float, typer.Option("--window", metavar="SECONDS", help="Of the time series and of --overload.", rich_help_panel=_OUTPUT)
    ] = 1.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="Write all figures there; a file there is replaced.",
            rich_help_panel=_OUTPUT, show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE.png|.svg", help="Draw load, latency, ratio and accuracy over time.",
            rich_help_panel=_OUTPUT, show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="FILE", help="Record the decisions of the first server.", rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    save_schedule: Annotated[
        Path | None,
        typer.Option(
            "--save-schedule", metavar="FILE.json", help="Write the oracle's ratio per request there.",
            rich_help_panel=_OUTPUT, show_default=False,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay", metavar="FILE", help="Instead: take the decisions of a recording again (bitdial serve --record) and "
            "tell the differences.", rich_help_panel=_OUTPUT, show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Simulate servers under a load, from measured service times and with the controller that `bitdial serve` runs.

    With --replicas auto: the smallest fleet that keeps the SLO with the policy, and with the smallest ratio only. All random
    choices come from --seed; equal arguments give equal figures.
    """
    terminal = Terminal(json, quiet)
    with terminal.running():
        if replay is not None:
            replay_decisions(terminal, replay)
            return
        if table is None:
            raise ConfigError(
                "give a file of service times (bitdial serve MODEL --save-table FILE writes one), or --replay"
            )
        _check_outputs(output, plot, record, save_schedule)
        from bitdial.quantization.curve import rise_remark
        from bitdial.serving.control import Settings, make_policy
        from bitdial.simulation import Fleet, Load, Noise, Sizing

        times = read_table(table, max_batch or max(images, 1 if images > 1 else 32), terminal)
        settings = Settings(
            slo=1e-3 * slo_ms, timeout=None if timeout_ms is None else 1e-3 * timeout_ms,
            max_batch=max_batch or (images if images > 1 else times.batches[-1]), max_wait=1e-3 * max_wait_ms,
            max_queue=max_queue, max_ratio=1.0 if max_ratio is None else reading.parse_share(max_ratio, "--max-ratio"),
            min_accuracy=None if min_accuracy is None else reading.parse_share(min_accuracy, "--min-accuracy"),
        )  # fmt: skip
        automatic = replicas.strip() == "auto"
        fleet = Fleet(1 if automatic else parse_replicas(replicas), workers, balancer, 1e-3 * overhead_ms, shared_core)
        spread = Noise(noise, replica_noise)
        allowed = settings.allowed(times)
        if policy != "oracle":
            make_policy(policy)
        one = [
            workers * times.throughput(i, max(images, settings.max_batch)) / images for i in (allowed[0], allowed[-1])
        ]
        played = make_load(
            trace, poisson, step, length, speed, rate, overload, window, fleet.replicas * one[0], automatic, seed
        )
        load = Load(played.times, images)
        work = Work(terminal, times, settings, load, fleet, spread, seed)
        content: dict[str, Any] = {
            "command": "simulate",
            "table": str(table),
            "load": {"text": played.text, "requests": load.arrivals.size, "seconds": played.seconds, "images": images},
            "settings": asdict(settings),
            "fleet": {**asdict(fleet), "replicas": "auto" if automatic else fleet.replicas},
            "noise": asdict(spread),
            "seed": seed,
            "capacity_per_replica": {"smallest_ratio": one[0], "largest_ratio": one[1], "unit": "requests/s"},
        }
        terminal.say(f"load: {played.text}; {count_name(load.arrivals.size)} requests in {duration(played.seconds)}")
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
            sizing = Sizing(
                reading.parse_share(attainment, "--attainment"),
                None if mean_accuracy is None else reading.parse_share(mean_accuracy, "--mean-accuracy"), most,
            )  # fmt: skip
            content["sizing"] = {**asdict(sizing), **work.size(policy, sizing)}
        else:
            rows = work.run(policy, compare, record)
            content["rows"] = [row.as_json() for row in rows]
            content["window_seconds"] = window
            content["series"] = work.series(rows, window)
        written = write_outputs(
            content, output, plot, lambda: work.picture(rows, window, table.stem, played.text), save_schedule,
            work.script(rows) if save_schedule is not None else None,
        )  # fmt: skip
        for path in written:
            terminal.say(f"wrote {path}")
        terminal.emit(content)


def read_table(path: Path, max_batch: int, terminal: Terminal) -> ServiceTable:
    """Service times of a JSON file, or of a model measured on this machine (as `bitdial serve` does; remembered for the next
    time). Raises ConfigError for what is neither, DataError if it cannot be read, BitdialError if the model cannot be run."""
    from bitdial.serving.control import ServiceTable

    if path.suffix.lower() == ".bitdial":
        return asyncio.run(_measure(path, max_batch, terminal))
    try:
        if path.stat().st_size > MOST_TABLE_BYTES:
            raise DataError(f"{path} is too large for a table of service times")
        return ServiceTable.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read the service times {path}: {error.strerror or error}") from error


async def _measure(path: Path, max_batch: int, terminal: Terminal) -> ServiceTable:
    from bitdial.serving.worker import ProcessWorker, WorkerOptions, measure_table

    worker = ProcessWorker(path, WorkerOptions(max_batch=max_batch))
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


def _check_outputs(output: Path | None, plot: Path | None, record: Path | None, schedule: Path | None) -> None:
    places = [path.absolute() for path in (output, plot, record, schedule) if path is not None]
    if len(set(places)) < len(places):
        raise ConfigError("two of the files to write are the same; give each its own name")
    if output is not None:
        files.check_output(output, force=output.suffix.lower() == ".json", option="--output")
    if schedule is not None:
        files.check_output(schedule, force=schedule.suffix.lower() == ".json", option="--save-schedule")
    if record is not None:
        files.check_output(record, force=False, option="--record")
    if plot is not None:
        from bitdial.report.drawing import check_plot_path

        check_plot_path(plot)
        files.check_output(plot, force=True, option="--plot")
