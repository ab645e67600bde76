"""`bitdial loadtest`: put a server under a known load and report what it held."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, options, reading
from bitdial.cli.terminal import Terminal, percent, safe
from bitdial.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bitdial.loadtest import Result, Schedule, Snapshot
    from bitdial.report.loadtest import LoadReport

KEY_VARIABLE = "BITDIAL_API_KEY"
DEFAULT_SECONDS = 30.0
_ARRIVALS, _TRACE, _REQUESTS, _CONNECTION = "Arrivals", "Trace", "Requests", "Connection"
_OUTPUT = options.OUTPUT_PANEL


def loadtest(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="URL [MODEL]",
            help="The server, and the model if it has several. With --compare: result files instead.",
            show_default=False,
        ),
    ],
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", rich_help_panel=_ARRIVALS, show_default=False,
            help="Arrival times: CSV with a column arrival_s, or one number of seconds a line.",
        ),
    ] = None,
    poisson: Annotated[
        float | None,
        typer.Option("--poisson", metavar="RATE", help="Requests/s, at random.", rich_help_panel=_ARRIVALS, show_default=False),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step", metavar="R:TIME,...", rich_help_panel=_ARRIVALS, show_default=False,
            help="Poisson arrivals in steps, for example 20:10s,80:10s,20:10s.",
        ),
    ] = None,
    uniform: Annotated[
        float | None,
        typer.Option("--uniform", metavar="RATE", help="Requests/s, evenly spaced.", rich_help_panel=_ARRIVALS,
                     show_default=False),
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--duration", metavar="TIME", rich_help_panel=_ARRIVALS, show_default=False,
            help="Stop sending after so long, for example 90s or 5m. Default: 30s; all of a trace or of the steps.",
        ),
    ] = None,
    seed: options.Seed = 0,
    scale_rate: Annotated[
        float | None,
        typer.Option(
            "--scale-rate", metavar="RATE", rich_help_panel=_TRACE, show_default=False,
            help="Leave requests out or double them, so that the mean over what is played is RATE requests/s.",
        ),
    ] = None,
    keep_peaks: Annotated[
        bool,
        typer.Option(
            "--keep-peaks", rich_help_panel=_TRACE,
            help="With --scale-rate: the same factor everywhere, so that peaks neither grow nor vanish by chance.",
        ),
    ] = False,
    speed: Annotated[
        float, typer.Option("--speed", metavar="X", help="Play the trace X times as fast.", rich_help_panel=_TRACE)
    ] = 1.0,
    begin: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="Begin there in the trace.", rich_help_panel=_TRACE, show_default=False),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="End there in the trace.", rich_help_panel=_TRACE, show_default=False),
    ] = None,
    again: Annotated[
        bool, typer.Option("--repeat", help="Repeat the trace until --duration.", rich_help_panel=_TRACE)
    ] = False,
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=1, help="Images per request.", rich_help_panel=_REQUESTS)
    ] = 1,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE.npz", rich_help_panel=_REQUESTS, show_default=False,
            help="Send these `images` (as the network takes them) and count right answers by their `labels`. Default: random.",
        ),
    ] = None,
    slo_ms: Annotated[
        float | None,
        typer.Option(
            "--slo-ms", metavar="MS", rich_help_panel=_REQUESTS, show_default=False,
            help="Answers should come so soon; sent with every request. Default: the server's own, if it tells.",
        ),
    ] = None,
    max_ratio: Annotated[
        str | None,
        typer.Option(
            "--max-ratio", metavar="SHARE", rich_help_panel=_REQUESTS, show_default=False,
            help="Sent with every request: the server must not turn the dial further for it (50, 50% or 0.5).",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give a request up so long after it was due.",
                            rich_help_panel=_REQUESTS)
    ] = 10.0,
    warmup: Annotated[
        int, typer.Option("--warmup", metavar="N", min=0, help="Requests sent one by one before the test, not counted.",
                          rich_help_panel=_REQUESTS)
    ] = 8,
    max_connections: Annotated[
        int, typer.Option("--max-connections", metavar="N", min=1, help="Never open more; requests then wait (and it is told).",
                          rich_help_panel=_CONNECTION)
    ] = 1024,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", rich_help_panel=_CONNECTION, show_default=False,
            help=f"File that holds the API key. Default: the variable {KEY_VARIABLE}, if set.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="FILE.pem", help="Certificates to trust with https.", rich_help_panel=_CONNECTION,
                     show_default=False),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="With https: do not check the server's certificate.", rich_help_panel=_CONNECTION)
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Send nothing: lay results (-o of earlier tests) over each other.",
                           rich_help_panel=_OUTPUT)
    ] = False,
    title: Annotated[
        str | None,
        typer.Option("--title", metavar="TEXT", help="Heading and name in legends.", rich_help_panel=_OUTPUT, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.json", rich_help_panel=_OUTPUT, show_default=False,
            help="Write every request and the figures. With --compare: the page (.html).",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE.html", help="Write a self-contained page.", rich_help_panel=_OUTPUT,
                     show_default=False),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE.png|.svg", help="Draw it (needs matplotlib).", rich_help_panel=_OUTPUT,
                     show_default=False),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:  # fmt: skip
    """Put a server of the Open Inference Protocol v2 under load and report latency, ratio and accuracy over time.

    Open loop: every request leaves when it is due, whatever became of the ones before, and latency is counted from the time
    it was due. How late the generator itself was is reported; give it a core of its own. Ctrl-C ends the test and reports.
    """
    terminal = Terminal(json, quiet)
    with terminal.running():
        if compare:
            if any(v is not None for v in (trace, poisson, step, uniform, data)):
                raise ConfigError("--compare sends nothing: leave out the arrivals and --data")
            page = html if html is not None else output
            if html is not None and output is not None:
                raise ConfigError("--compare writes one page: give either -o or --html")
            _check_outputs(None, page, png)
            _compare(terminal, [Path(name) for name in target], title, page, png)
            return
        if len(target) > 2:
            raise ConfigError(f"'{target[2]}' is one argument too many: a load test takes URL and MODEL")
        _check_outputs(output, html, png)
        from bitdial.loadtest import LoadPlan, parse_url, read_labelled, run_load

        schedule = make_schedule(
            trace, poisson, step, uniform, duration, scale_rate, keep_peaks, speed, begin, end, again, seed
        )  # fmt: skip
        plan = LoadPlan(
            schedule, images, None if slo_ms is None else slo_ms / 1e3,
            max_ratio=None if max_ratio is None else reading.parse_share(max_ratio, "--max-ratio"),
            timeout=timeout, warmup=warmup, max_connections=max_connections, seed=seed, title=title or "",
        )  # fmt: skip
        place, named = parse_url(target[0], api_key=read_key(api_key_file), ca_file=ca, verify=not insecure)
        labelled = None if data is None else read_labelled(data)
        terminal.note(f"{len(schedule.times):,} requests in {schedule.seconds:.6g} s ({schedule.text}) to {place.url}")
        with _progress(terminal) as observer:
            result = run_load(place, target[1] if len(target) > 1 else named, plan, data=labelled, observer=observer)
        report = _report([result], None, title)
        written = _write(report, result, output, html, png)
        _print(terminal, report)
        for path in written:
            terminal.say(f"wrote {path}")
        terminal.emit(_content(result, written))
        if not result.ok.any():
            terminal.note("error: no request was answered")
            raise typer.Exit(1)
        if result.settings["stopped_early"]:
            raise typer.Exit(130)


def make_schedule(
    trace: Path | None = None,
    poisson: float | None = None,
    step: str | None = None,
    uniform: float | None = None,
    duration: str | None = None,
    scale_rate: float | None = None,
    keep_peaks: bool = False,
    speed: float = 1.0,
    begin: str | None = None,
    end: str | None = None,
    again: bool = False,
    seed: int = 0,
) -> Schedule:
    """The schedule that the options of a load test (or of a simulation) describe. Raises ConfigError, DataError."""
    from bitdial import loadtest as load

    choices = {"--trace": trace, "--poisson": poisson, "--step": step, "--uniform": uniform}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        told = " and ".join(given) + " are both given" if given else "no arrivals are given"
        raise ConfigError(f"{told}; give one of --trace FILE, --poisson RATE, --step R:TIME,... or --uniform RATE")
    seconds = None if duration is None else load.parse_duration(duration)
    if trace is None and (scale_rate is not None or speed != 1.0 or begin or end or again or keep_peaks):
        raise ConfigError("--scale-rate, --keep-peaks, --speed, --from, --to and --repeat are about a --trace")
    if keep_peaks and scale_rate is None:
        raise ConfigError("--keep-peaks says how --scale-rate is done: give it too")
    if again and seconds is None:
        raise ConfigError("--repeat needs --duration: how long should the trace be repeated?")
    if trace is not None:
        times = load.read_trace(trace)
        first = 0.0 if begin is None or begin.strip() in ("0", "0s") else load.parse_duration(begin)
        return load.fit_trace(
            times, text=trace.stem, begin=first, end=None if end is None else load.parse_duration(end), speed=speed,
            duration=seconds, again=again, rate=scale_rate, keep_peaks=keep_peaks, seed=seed,
        )  # fmt: skip
    if step is not None:
        levels = load.parse_steps(step)
        length = sum(s for _, s in levels)
        times, text = load.steps(levels, seed), f"steps {step}"
        seconds = min(seconds or length, length)
        times = times[times < seconds]
    else:
        seconds = seconds or DEFAULT_SECONDS
        if poisson is not None:
            times, text = load.poisson(poisson, seconds, seed), f"Poisson, {poisson:g} requests/s"
        else:
            assert uniform is not None
            times, text = load.uniform(uniform, seconds), f"evenly spaced, {uniform:g} requests/s"
    if not len(times):
        raise ConfigError("not one request falls due; raise the rate or the duration")
    return load.Schedule(times, seconds, text)


def read_key(path: Path | None) -> str | None:
    """The API key of a file, else of the environment. Raises DataError."""
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the API key in {path}: {error}") from None
    if not key:
        raise DataError(f"{path} is empty; it should hold the API key")
    return key


def _check_outputs(output: Path | None, html: Path | None, png: Path | None) -> None:
    places = [path.absolute() for path in (output, html, png) if path is not None]
    if len(set(places)) < len(places):
        raise ConfigError("two outputs name the same file; give each its own")
    if output is not None:
        files.check_output(output, force=output.suffix.lower() == ".json", option="--output")
    if html is not None:
        files.check_output(html, force=html.suffix.lower() in (".html", ".htm"), option="--html")
    if png is not None:
        from bitdial.report.drawing import check_plot_path

        check_plot_path(png, "--png")
        files.check_output(png, force=True, option="--png")


def _report(results: list[Result], names: list[str] | None, title: str | None) -> LoadReport:
    from bitdial.report.loadtest import load_report

    return load_report(results, names, title or "")


def _write(report: LoadReport, result: Result | None, output: Path | None, html: Path | None, png: Path | None) -> list[Path]:
    """Draw everything, then write all files or none."""
    from bitdial.report.writing import write_files

    contents: dict[Path, bytes] = {}
    if output is not None and result is not None:
        from bitdial.loadtest import result_json

        contents[output] = result_json(result)
    if html is not None:
        from bitdial.report.loadtest_page import render_load_html

        contents[html] = render_load_html(report).encode()
    if png is not None:
        from bitdial.report.drawing import plot_for
        from bitdial.report.loadtest_page import load_chart

        contents[png] = plot_for(load_chart(report), png)
    return write_files(contents)


def _compare(terminal: Terminal, paths: list[Path], title: str | None, html: Path | None, png: Path | None) -> None:
    from bitdial.loadtest import read_result, summarize

    results = [read_result(path) for path in paths]
    report = _report(results, [r.title or p.stem for r, p in zip(results, paths, strict=True)], title)
    written = _write(report, None, None, html, png)
    _print(terminal, report)
    for path in written:
        terminal.say(f"wrote {path}")
    runs = [{"file": str(p), "summary": summarize(r)} for p, r in zip(paths, results, strict=True)]
    terminal.emit({"command": "loadtest", "compare": runs, "files": [str(path) for path in written]})


def _content(result: Result, written: list[Path]) -> dict[str, Any]:
    from bitdial.loadtest import summarize, warnings_of

    return {
        "command": "loadtest",
        "model": result.model,
        "settings": result.settings,
        "generator": result.generator,
        "summary": summarize(result),
        "errors": result.errors,
        "warnings": warnings_of(result),
        "files": [str(path) for path in written],
    }


def _print(terminal: Terminal, report: LoadReport) -> None:
    from bitdial.report.loadtest import figure_rows

    names = [run.name for run in report.runs]
    rows = [[name, *(text.replace("\u00a0", " ").replace("–", "-") for text in cells)] for name, cells in figure_rows(report)]
    terminal.table(["", *names], rows, report.title)
    for run in report.runs:
        for text, count in list(run.result.errors.items())[:5]:
            terminal.say(f"{count} x {text}" if len(names) == 1 else f"{run.name}: {count} x {text}")
    for name, text in report.warnings:
        terminal.note(f"note: {text}" if len(names) == 1 else f"note: {name}: {text}")


@contextlib.contextmanager
def _progress(terminal: Terminal) -> Iterator[Callable[[Snapshot], None] | None]:
    """One line on standard error: how far, the load, the last second's p99 and ratio, failures so far."""
    if not terminal.shows_progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # Drawn only when told to: a thread of rich's own would hold the interpreter while a request falls due.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    task = bar.add_task("starting", total=1.0)

    def show(now: Snapshot) -> None:
        bar.update(task, completed=min(1.0, now.elapsed / now.seconds), description=safe(progress_line(now)), refresh=True)

    with bar:
        yield show


def progress_line(now: Snapshot) -> str:
    """A snapshot as one line of text."""
    lost = sum(now.counts[name] for name in ("shed", "expired", "failed", "timeout"))
    parts = [
        f"{min(now.elapsed, now.seconds):.0f}/{now.seconds:.0f} s",
        f"{now.offered:.0f}/s sent",
        f"{now.answered:.0f}/s answered",
        "p99 -" if now.p99 is None else f"p99 {1e3 * now.p99:.3g} ms",
        *([] if now.ratio is None else [f"ratio {percent(now.ratio, 0)}"]),
        f"{now.under_way} under way",
        f"{lost:,} lost",
    ]
    return "  ".join(parts)
