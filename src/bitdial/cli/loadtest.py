"""`bitdial loadtest`: put a server under a known load and report what it held."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, options
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, percent, safe
from bitdial.errors import ConfigError, DataError

if TYPE_CHECKING:
    from bitdial.loadtest import Result, Snapshot
    from bitdial.report.loadtest import LoadReport

KEY_VARIABLE = "BITDIAL_API_KEY"
_CONNECTION, _OUTPUT = "Connection", options.OUTPUT_PANEL


@command
def loadtest(
    *,
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="URL [MODEL]",
            help="The server, and the model if it has several. With --compare: result files instead.",
            show_default=False,
        ),
    ],
    arrivals: Annotated[Given, options_of("bitdial.cli.arrivals:Arrivals")],
    requests: Annotated[Given, options_of("bitdial.loadtest.generator:LoadPlan")],
    data: Annotated[
        Path | None,
        option(
            "--data", "FILE.npz",
            "Send these `images` (as the network takes them) and count right answers by their `labels`. Default: random.",
            "Requests",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        option(
            "--api-key-file", "FILE", f"File that holds the API key. Default: the variable {KEY_VARIABLE}, if set.", _CONNECTION
        ),
    ] = None,
    ca: Annotated[Path | None, option("--ca", "FILE.pem", "Certificates to trust with https.", _CONNECTION)] = None,
    insecure: Annotated[
        bool, option("--insecure", "", "With https: do not check the server's certificate.", _CONNECTION)
    ] = False,
    compare: Annotated[
        bool, option("--compare", "", "Send nothing: lay results (-o of earlier tests) over each other.", _OUTPUT)
    ] = False,
    output: Annotated[
        Path | None,
        option(
            "--output -o", "FILE.json", "Write every request and the figures. With --compare: the page (.html).", _OUTPUT
        ),
    ] = None,
    html: Annotated[Path | None, option("--html", "FILE.html", "Write a self-contained page.", _OUTPUT)] = None,
    png: Annotated[Path | None, option("--png", "FILE.png|.svg", "Draw it (needs matplotlib).", _OUTPUT)] = None,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Put a server of the Open Inference Protocol v2 under load and report latency, ratio and accuracy over time.

    Open loop: every request leaves when it is due, whatever became of the ones before, and latency is counted from the time
    it was due. How late the generator itself was is reported; give it a core of its own. Ctrl-C ends the test and reports.
    """
    if compare:
        if arrivals or data is not None:
            raise ConfigError("--compare sends nothing: leave out the arrivals and --data")
        page = html if html is not None else output
        if html is not None and output is not None:
            raise ConfigError("--compare writes one page: give either -o or --html")
        files.check_outputs(html=page, png=png)
        _compare(terminal, [Path(name) for name in target], requests.get("title"), page, png)
        return
    if len(target) > 2:
        raise ConfigError(f"'{target[2]}' is one argument too many: a load test takes URL and MODEL")
    files.check_outputs(output=output, html=html, png=png)
    from bitdial.cli.arrivals import Arrivals, make_schedule
    from bitdial.loadtest import LoadPlan, parse_url, read_labelled, result_json, run_load
    from bitdial.report.loadtest import load_report
    from bitdial.report.loadtest_page import load_chart, render_load_html

    schedule = make_schedule(Arrivals(**arrivals), requests.get("seed", 0))
    plan = LoadPlan(**requests, schedule=schedule)
    place, named = parse_url(target[0], api_key=read_key(api_key_file), ca_file=ca, verify=not insecure)
    labelled = None if data is None else read_labelled(data)
    terminal.note(f"{len(schedule.times):,} requests in {schedule.seconds:.6g} s ({schedule.text}) to {place.url}")
    with _progress(terminal) as observer:
        result = run_load(place, target[1] if len(target) > 1 else named, plan, data=labelled, observer=observer)
    report = load_report([result], None, plan.title or "")
    written = files.write_made(
        (output, lambda: result_json(result)), (html, lambda: render_load_html(report)), (png, lambda: load_chart(report))
    )
    _print(terminal, report)
    for path in written:
        terminal.say(f"wrote {path}")
    terminal.emit(_content(result, written))
    if not result.ok.any():
        terminal.note("error: no request was answered")
        raise typer.Exit(1)
    if result.settings["stopped_early"]:
        raise typer.Exit(130)


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


def _compare(terminal: Terminal, paths: list[Path], title: str | None, html: Path | None, png: Path | None) -> None:
    from bitdial.loadtest import read_result, summarize
    from bitdial.report.loadtest import load_report
    from bitdial.report.loadtest_page import load_chart, render_load_html

    results = [read_result(path) for path in paths]
    report = load_report(results, [r.title or p.stem for r, p in zip(results, paths, strict=True)], title or "")
    written = files.write_made((html, lambda: render_load_html(report)), (png, lambda: load_chart(report)))
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
