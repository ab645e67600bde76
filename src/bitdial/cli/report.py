"""`bitdial report`: one self-contained HTML file about a .bitdial file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bitdial.cli import files, machine, options
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal
from bitdial.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from bitdial.quantization.program import Program
    from bitdial.report.data import ReportData

SATURATION_IMAGES = 512  # enough to see which layers clip; counting takes a run per ratio


@command
def report(
    *,
    model: options.Model,
    output: Annotated[Path, option("--output -o", "REPORT.html", "The report; a file there is replaced.")],
    png: Annotated[
        Path | None, option("--png", "DIR", "Write the plots into this folder too (needs matplotlib).")
    ] = None,
    csv: Annotated[Path | None, option("--csv", "DIR", "Write the tables into this folder too, as CSV files.")] = None,
    data: options.Data,
    images: options.Images = None,
    title: Annotated[str | None, option("--title", "TEXT", "Heading. Default: the file's name.")] = None,
    engine: options.EngineName = "reference",
    batch_size: options.BatchSize = 100,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Write the report of a model: curve, map of low groups, value ranges, what ran in float, search.

    --png: accuracy.png, agreement.png, executed.png, groups.png, unused.png, ranges.png, search.png.
    --csv: curve.csv, baselines.csv, layers.csv, saturation.csv, ablation.csv, search.csv.
    What has nothing to show is left out; files of these names are replaced.

    With --data: a fresh curve on the test part, and how many low values saturate.
    """
    check_report(output, png, csv)
    from bitdial.artifact import load_program
    from bitdial.cli.measure import report_rows

    program = load_program(model)
    evaluation = program.provenance.get("evaluation") or {}
    curve: list[dict[str, Any]] | None = None
    saturation: list[dict[str, Any]] = []
    if "data" in data:
        from bitdial.cli.data import Batches, DataOptions, draw
        from bitdial.cli.measure import measure_curve

        machine.set_threads(threads)
        from bitdial.api import QuantizedModel

        given = DataOptions(**data)
        stored = program.provenance.get("source") or {}
        used, record = given.drawn("test", images, seed, stored, program)
        batches = Batches(used, batch_size)
        with terminal.progress() as progress:
            curve = measure_curve(QuantizedModel(program, engine), batches, None, progress)
            few = Batches(draw(used, SATURATION_IMAGES, seed), batch_size)
            saturation = count_saturated(program, few, progress)
        if evaluation and record != {k: v for k, v in evaluation.items() if k != "baselines"}:
            terminal.note("note: the stored baselines were measured on other images and are left out")
            evaluation = {}
    elif images is not None:
        raise ConfigError("--images says how much of the data to use: give --data too")
    content = build_report(
        program,
        title or model.stem,
        curve=curve,
        baselines=report_rows(evaluation),
        saturation=saturation,
        engine=engine,
    )
    written = write_report(content, output, png, csv)
    for path in written:
        terminal.say(f"wrote {path}")
    if "data" not in data and not program.curve:
        terminal.note("note: the model holds no curve; --data measures one")
    terminal.emit({"command": "report", "model": str(model), "files": [str(path) for path in written]})


def check_report(output: Path, png: Path | None = None, csv: Path | None = None) -> None:
    """Raise OutputError early if a report could not be written, ConfigError if its plots could not be drawn."""
    # Reports are made again and again, so one is replaced without asking; anything else that lies there is not.
    files.check_output(output, force=output.suffix.lower() in (".html", ".htm"))
    if png is not None:
        from bitdial.report.drawing import check_plotting

        check_plotting()
    for folder, name in ((png, "--png"), (csv, "--csv")):
        if folder is not None:
            _check_new_folder(folder, name)


def _check_new_folder(folder: Path, option: str) -> None:
    """Raise OutputError if `folder` could not be made or filled. Makes nothing: the work before may still fail."""
    place = folder.absolute()
    existing = next(p for p in (place, *place.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise OutputError(f"{option} {folder}: {existing} is no folder; give the name of a folder")
    files.check_folder(existing, option)


def count_saturated(program: Program, batches: Iterable[Any], progress: Any) -> list[dict[str, Any]]:
    """Saturation rows of every ratio above 0."""
    from bitdial.benchmarking.saturation import count_saturation

    rows: list[dict[str, Any]] = []
    indices = [i for i, ratio in enumerate(program.ratios) if ratio > 0.0]
    for done, index in enumerate(indices):
        progress("counting saturation", done / len(indices))
        rows += count_saturation(program, (inputs for inputs, _ in batches), index)
    return rows


def build_report(
    program: Program,
    title: str,
    *,
    curve: Sequence[dict[str, Any]] | None = None,
    baselines: Sequence[dict[str, Any]] = (),
    saturation: Sequence[dict[str, Any]] = (),
    engine: str = "reference",
) -> ReportData:
    """The data of a report, dated now."""
    from bitdial.report.collect import collect_report

    source = program.provenance.get("source") or {}
    return collect_report(
        program,
        title=title,
        model=str(source.get("model", "")),
        curve=curve,
        baselines=baselines,
        saturation=saturation,
        engine=engine,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def write_report(content: ReportData, output: Path, png: Path | None = None, csv: Path | None = None) -> list[Path]:
    """Write the HTML file and, with folders for them, plots and tables; returns the files. Raises OutputError."""
    from bitdial.report.writing import write_report as write

    return write(content, output, png, csv)
