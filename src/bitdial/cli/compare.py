"""`bitdial compare`: two .bitdial files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import machine, options
from bitdial.cli.configs import command
from bitdial.cli.terminal import Terminal, percent, ratio_name, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.cli.data import DataOptions


@command
def compare(
    *,
    first: Annotated[Path, typer.Argument(metavar="A.bitdial", help="One model.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.bitdial", help="The other.", show_default=False)],
    data: options.Data,
    images: options.Images = None,
    engine: options.EngineName = "reference",
    batch_size: options.BatchSize = 100,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Compare sizes, settings and curves of two models: the stored curves, or fresh ones on the test part of --data."""
    from bitdial.artifact import inspect_file

    paths = [first, second]
    files = [inspect_file(path) for path in paths]
    if "data" not in data:
        curves = [[dict(row) for row in file["curve"] or []] for file in files]
        settings = [_evaluation(file) for file in files]
        comparable = bool(settings[0]) and settings[0] == settings[1]
        if not all(curves):
            missing = " and ".join(path.name for path, curve in zip(paths, curves, strict=True) if not curve)
            terminal.note(f"note: no curve is stored in {missing}; --data measures one")
        elif not comparable:
            terminal.note(
                "note: the stored curves were not measured on the same images; --data measures both on the same"
            )
    else:
        from bitdial.cli.data import DataOptions

        given = DataOptions(**data)
        curves = _measure(terminal, paths, given, images, engine, batch_size, seed, threads)
        comparable = True
    merged = merge(curves[0], curves[1], comparable)
    _print(terminal, paths, files, merged)
    terminal.emit(
        {
            "command": "compare",
            "models": [
                {
                    "path": str(path),
                    "sizes": file["sizes"],
                    "band": file["band"],
                    "config": _config(file),
                    "curve": curve,
                }
                for path, file, curve in zip(paths, files, curves, strict=True)
            ],
            "same_images": comparable,
            "rows": merged,
        }
    )


def merge(first: list[dict[str, Any]], second: list[dict[str, Any]], comparable: bool) -> list[dict[str, Any]]:
    """One row per ratio of either curve: both accuracies, and their difference if measured on the same images."""
    curves = [{float(row["ratio"]): row for row in curve if row.get("ratio") is not None} for curve in (first, second)]
    rows = []
    for ratio in sorted({*curves[0], *curves[1]}):
        pair = [curve.get(ratio, {}) for curve in curves]
        a, b = (row.get("accuracy") for row in pair)
        rows.append(
            {
                "ratio": ratio,
                "accuracy": [a, b],
                "difference": b - a if comparable and a is not None and b is not None else None,
                "agreement": [row.get("agreement") for row in pair],
                "low_share": [row.get("low_share") for row in pair],
            }
        )
    return rows


def _measure(
    terminal: Terminal,
    paths: list[Path],
    given: DataOptions,
    images: int | None,
    engine: str,
    batch_size: int,
    seed: int,
    threads: int | None,
) -> list[list[dict[str, Any]]]:
    from bitdial.api import load
    from bitdial.cli.data import Batches
    from bitdial.cli.measure import measure_curve

    machine.set_threads(threads)
    models = [load(path, engine) for path in paths]
    sources = [model.program.provenance.get("source") or {} for model in models]
    if given.describe(sources[0]) != given.describe(sources[1]):
        raise ConfigError(
            "the two models were quantized with different --mean, --std, --resize or --split-seed; give these, so that "
            "both see the same images"
        )
    used, record = given.drawn("test", images, seed, sources[0], *(model.program for model in models))
    terminal.say(f"measured on {len(used)} of {record['of']} test images, engine {engine}")
    curves = []
    with terminal.progress() as progress:
        for path, model in zip(paths, models, strict=True):
            curves.append(
                measure_curve(model, Batches(used, batch_size), None, lambda _, s, name=path.name: progress(name, s))  # type: ignore[misc]
            )
    return curves


def _evaluation(file: dict[str, Any]) -> dict[str, Any]:
    """What tells whether two stored curves were measured on the same images."""
    stored = (file["provenance"] or {}).get("evaluation") or {}
    return {k: v for k, v in stored.items() if k != "baselines"}


def _config(file: dict[str, Any]) -> dict[str, Any]:
    return dict((file["provenance"] or {}).get("config") or {})


def _print(terminal: Terminal, paths: list[Path], files: list[dict[str, Any]], merged: list[dict[str, Any]]) -> None:
    names = [path.name if paths[0].name != paths[1].name else str(path) for path in paths]
    sizes = {"total": "file", "weights": "weights", "tables": "tables", "float_leftovers": "float constants"}
    rows = [[label, *(size_name(file["sizes"][key]) for file in files)] for key, label in sizes.items()]
    configs = [_config(file) for file in files]
    for key in sorted({*configs[0], *configs[1]}):
        values = [config.get(key, "-") for config in configs]
        if values[0] != values[1]:
            rows.append([key, *(str(value) for value in values)])
    bands = [file["band"] for file in files]
    if any(bands):
        rows.append(
            ["band", *("-" if band is None else f"{ratio_name(band[0])} to {ratio_name(band[1])}" for band in bands)]
        )
    terminal.table(["size, and settings that differ", *names], rows)
    if not merged:
        return
    columns = ["ratio", *(f"accuracy {name}" for name in names), "points", *(f"agreement {name}" for name in names),
               *(f"low {name}" for name in names)]  # fmt: skip
    terminal.table(
        columns,
        [
            [
                ratio_name(row["ratio"]),
                *(percent(a) for a in row["accuracy"]),
                "-" if row["difference"] is None else f"{100 * row['difference']:+.2f}",
                *(percent(a) for a in row["agreement"]),
                *(percent(s, 1) for s in row["low_share"]),
            ]
            for row in merged
        ],
        "points: the second less the first",
    )
