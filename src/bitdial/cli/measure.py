"""The accuracy curve, the baselines beside it, and the table both make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bitdial.cli.terminal import Terminal, percent, ratio_name
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.curve import column, rise_remark
from bitdial.quantization.program import Program

if TYPE_CHECKING:
    import torch

    from bitdial.api import QuantizedModel

Row = dict[str, Any]
Progress = Callable[[str, float], None]
Batch = tuple[Any, Any]


class Batches(Protocol):
    """(inputs, labels) batches whose number is known; read anew on every pass."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


NAIVE_RATIOS = (0.0, 0.5, 1.0)


def naive_config(config: QuantizeConfig) -> QuantizeConfig:
    """The baseline: always the top bits, no bias correction, channels unsorted, groups chosen greedily; 4 bits where widths
    are chosen per layer, and no regard for latency."""
    return config.updated(
        low_bits=4 if config.low_bits == "auto" else config.low_bits,
        latency_gain=0.0,
        extraction="naive",
        effort="normal",
        shift_choice="plain",
        bias_correction=False,
        sort_channels=False,
        equalize=None,
        smooth=None,
        selector="greedy",
        ratios=NAIVE_RATIOS,
    )


def naive_program(
    model: torch.nn.Module, calibration: torch.Tensor, config: QuantizeConfig, progress: Progress
) -> Program:
    """The same network quantized as the baseline, on the same images."""
    from bitdial.api import prepare_model
    from bitdial.pipeline import quantize_prepared

    settings = naive_config(config)
    prepared = prepare_model(model, calibration, settings)
    return quantize_prepared(prepared, settings, progress=lambda _, share: progress("naive baseline", share))


def measure_curve(
    model: QuantizedModel, batches: Batches, ratios: Sequence[float] | None, progress: Progress
) -> list[Row]:
    """One row per ratio, agreement against the smallest ratio of the table (0: the 8-bit model).

    ratios: entries of the model's table; None: all.
    """
    from bitdial.report.collect import low_share_of_all

    table = model.ratios
    wanted = table if ratios is None else list(ratios)
    measured = wanted if wanted[0] == table[0] else [table[0], *wanted]
    rows = model.evaluate(batches, ratios=measured, progress=lambda share: progress("measuring the curve", share))
    for row in rows:
        row["low_share"] = low_share_of_all(model.program, table.index(row["ratio"]))
    return rows[len(measured) - len(wanted) :]


def measure_baselines(
    float_model: torch.nn.Module,
    naive: Program | None,
    eight_bit: Callable[[Any], Any],
    batches: Batches,
    progress: Progress,
) -> list[Row]:
    """Rows "float32" and "naive N-bit" at 50 and 100 %; agreement against the same 8-bit model as the curve's."""
    from bitdial.benchmarking.accuracy import evaluate_curve
    from bitdial.engines.base import create_engine
    from bitdial.report.collect import low_share_of_all

    runs: list[Callable[[Any], Any]] = [eight_bit, float_model]
    rows: list[Row] = [{}, {"label": "float32", "ratio": None, "low_share": 0.0}]
    if naive is not None:
        engine = create_engine(naive)
        label = f"naive {naive.provenance['config']['low_bits']}-bit"
        for index, ratio in enumerate(naive.ratios):
            if ratio > 0.0:
                runs.append(lambda inputs, ratio=ratio: engine.run(inputs, ratio))  # type: ignore[misc]
                rows.append({"label": label, "ratio": ratio, "low_share": low_share_of_all(naive, index)})
    measured = evaluate_curve(
        lambda inputs, which: runs[int(which)](inputs),
        [float(i) for i in range(len(runs))],
        batches,
        progress=lambda share: progress("measuring the baselines", share),
        total=len(batches),
    )
    keep = ("accuracy", "standard_error", "agreement", "distance", "samples")
    return [{**row, **{k: found[k] for k in keep}} for row, found in zip(rows, measured, strict=True)][1:]


def table_ratios(program: Program, wanted: Sequence[float] | None) -> list[float]:
    """The table's entries for the ratios asked for (each the nearest at or below), ascending. Raises RatioError."""
    from bitdial.engines.base import ratio_index

    if wanted is None:
        return list(program.ratios)
    return [program.ratios[i] for i in sorted({ratio_index(program.ratios, r) for r in wanted})]


def print_curve(
    terminal: Terminal, rows: Sequence[Row], baselines: Sequence[Row], base: float = 0.0, title: str = ""
) -> None:
    """One line per row; baselines below. base: the ratio that agreement and distance (of soft labels) are against."""
    against = "agreement with 8-bit" if base == 0.0 else f"agreement with {ratio_name(base)}"
    columns = ["setting", "accuracy", "std. error", against, "distance", "low-precision multiplies"]
    shown = [[_setting(row), *_cells(row)] for row in [*rows, *baselines]]
    terminal.table(columns, shown, title)
    if remark := rise_remark([a for row in rows for a in column([row], [row["ratio"]], "accuracy")]):
        terminal.say(remark)


def _setting(row: Row) -> str:
    if "label" in row:
        return str(row["label"]) + ("" if row.get("ratio") is None else f" at {ratio_name(row['ratio'])}")
    return f"ratio {ratio_name(row['ratio'])}" + (" (8-bit)" if row["ratio"] == 0.0 else "")


def _cells(row: Row) -> list[str]:
    error = row.get("standard_error")
    return [
        percent(row.get("accuracy")),
        "-" if error is None else f"{100 * error:.2f}",
        percent(row.get("agreement")),
        "-" if row.get("distance") is None else f"{row['distance']:.4f}",
        percent(row.get("low_share"), 1),
    ]


def report_rows(evaluation: Mapping[str, Any] | None) -> list[Row]:
    """The baselines kept in a model's provenance["evaluation"], as rows for the report."""
    return [dict(row) for row in (evaluation or {}).get("baselines") or ()]
