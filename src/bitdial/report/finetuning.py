"""What a finetuning run did, as plain data for its page and its picture: read from a model's provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdial.errors import DataError
from bitdial.quantization.program import Program
from bitdial.report.axis import Axis, linear_axis
from bitdial.report.data import Baseline, CurvePoint, ReportData
from bitdial.report.markup import percent
from bitdial.report.series import CurveSeries, curve_series

FIRST_UPDATES = 20  # a stored loss is the mean of a tenth of an epoch, at least of so many updates


@dataclass(frozen=True)
class Change:
    """One ratio before and after, accuracies 0..1. error: standard error of the difference, None if it was not measured."""

    ratio: float
    before: float
    after: float
    error: float | None

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class FinetuningReport:
    """title: of the model. measured: what the curves were measured on ("" if nothing was). losses, accuracies: (update, value)
    over the training; accuracies on the validation images per ratio index. best: update whose state was kept.
    """

    title: str
    machine: str
    created: str
    changes: tuple[Change, ...]
    measured: str
    float_accuracy: float | None
    ratios: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
    accuracies: tuple[tuple[tuple[float, float], ...], ...]
    best: int
    updates: int
    per_epoch: float
    stopped: str
    settings: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def curve(self) -> CurveSeries | None:
        """The curves before and after for `curve_chart`; None if neither was measured."""
        if not self.changes:
            return None
        points = [
            CurvePoint(ratio=c.ratio, accuracy=c.after, agreement=None, low_share=0.0, eligible_share=0.0)
            for c in self.changes
        ]
        baselines = [Baseline(label="before", accuracy=c.before, agreement=None, ratio=c.ratio) for c in self.changes]
        if self.float_accuracy is not None:
            baselines.insert(0, Baseline(label="float32", accuracy=self.float_accuracy))
        return curve_series(ReportData(title=self.title, model="", curve=points, baselines=baselines), "accuracy")

    def mean(self, which: str) -> float | None:
        """Mean accuracy over the ratios, "before" or "after"."""
        values = [float(getattr(c, which)) for c in self.changes]
        return sum(values) / len(values) if values else None


def finetuning_report(program: Program, title: str, created: str = "") -> FinetuningReport:
    """The report of a finetuned program. Raises DataError if it was not finetuned, or its record cannot be read."""
    record = program.provenance.get("finetuning")
    if not isinstance(record, Mapping):
        raise DataError(f"{title} was not finetuned: there is nothing to report on; bitdial finetune does that")
    try:
        return _read(program, record, title, created)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{title}: the record of its finetuning cannot be read ({error!r}); finetune it again"
        ) from error


def _read(program: Program, record: Mapping[str, Any], title: str, created: str) -> FinetuningReport:
    rows = record["evaluations"]
    later = [row for row in rows if row["epoch"] > 0]
    per_epoch = float(later[0]["update"]) / float(later[0]["epoch"]) if later else float(max(1, record["updates"]))
    every = max(FIRST_UPDATES, round(per_epoch) // 10)
    losses = [(float((k + 1) * every), float(value)) for k, value in enumerate(record["losses"])]
    if len(losses) < 2:  # a short run: its evaluations tell as much
        losses = [(float(row["update"]), float(row["loss"])) for row in rows if row["loss"] is not None]
    shown = [row for row in rows if row["accuracies"]]
    accuracies = [
        tuple((float(row["update"]), float(row["accuracies"][index])) for row in shown)
        for index in range(len(program.ratios) if shown else 0)
    ]
    changes, measured = _changes(program, record, shown)
    evaluation = program.provenance.get("evaluation") or {}
    baselines = evaluation.get("baselines") or ()
    floats = [row["accuracy"] for row in baselines if row.get("label") == "float32"] if record.get("before") else []
    seconds = record["seconds"]
    rest = seconds["seconds"] - seconds["training_seconds"] - seconds["derive_seconds"]
    times = {
        "in all": span(seconds["seconds"]),
        "updates": f"{span(seconds['training_seconds'])}, {_each(seconds['training_seconds'], record['updates'])}",
        "shifts and bias table": span(seconds["derive_seconds"]),
        "evaluation, checkpoints": span(max(0.0, rest)),
    }
    return FinetuningReport(
        title, _machine(record), created, tuple(changes), measured, floats[0] if floats else None, tuple(program.ratios),
        tuple(p for p in losses if math.isfinite(p[1])), tuple(accuracies), int(record["best_update"]),
        int(record["updates"]), per_epoch, str(record["stopped"]),
        {name.replace("_", " "): _plain(value) for name, value in record["config"].items()}, times, _data(record),
    )  # fmt: skip


def _changes(
    program: Program, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Change], str]:
    """The curves on the test images; where none were measured, on the validation images at the start and at the best update."""
    before, after = record.get("before") or [], program.curve
    if before and after and all(row["accuracy"] is not None for row in (*before, *after)):
        errors = {row["ratio"]: row["standard_error"] for row in record.get("differences") or ()}
        evaluation = program.provenance.get("evaluation") or {}
        told = f"{evaluation['images']} test images of {evaluation['data']}" if evaluation else "the evaluation data"
        pairs = zip(before, after, strict=True)
        return [Change(a["ratio"], a["accuracy"], b["accuracy"], errors.get(a["ratio"])) for a, b in pairs], told
    if rows:
        best = next((row for row in rows if row["update"] == record["best_update"]), rows[-1])
        values = zip(program.ratios, rows[0]["accuracies"], best["accuracies"], strict=True)
        return [Change(r, a, b, None) for r, a, b in values], "the validation images"
    return [], ""


def _data(record: Mapping[str, Any]) -> dict[str, str]:
    data = record.get("data") or {}
    names = {"data": "data", "training": "training images", "validation": "validation images", "augmented": "augmented"}
    return {told: _plain(data[name]) for name, told in names.items() if name in data}


def _machine(record: Mapping[str, Any]) -> str:
    parts = [str(record.get("cpu", ""))]
    if record.get("device") not in (None, "cpu"):
        parts.append(str(record["device"]))
    if "bfloat16" in record:
        parts.append("bfloat16" if record["bfloat16"] else "float32")
    if "threads" in record:
        parts.append(f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}")
    return ", ".join(p for p in parts if p)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def span(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _each(seconds: float, updates: int) -> str:
    return f"{1000 * seconds / max(1, updates):.3g} ms each"


def axes(points: Sequence[tuple[float, float]], updates: int, per_epoch: float) -> tuple[Axis, Axis]:
    """(epochs along, values up) for points (update, value)."""
    last = max(updates / per_epoch, 1e-9)
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 500) if last / s <= 8 or s == 500)
    ticks = tuple(round(k * step, 6) for k in range(int(last / step + 1e-6) + 1))
    return Axis(0.0, last, ticks), linear_axis([v for _, v in points])


def tile_rows(report: FinetuningReport) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what matters most."""
    rows = []
    changes = report.changes
    mean = report.mean("before"), report.mean("after")
    if mean[0] is not None and mean[1] is not None:
        rows.append(("Mean over all ratios", percent(mean[1], 2), f"before {percent(mean[0], 2)}"))
        for change in (changes[-1], changes[0]) if len(changes) > 1 else changes:
            name = f"At ratio {100 * change.ratio:.4g}\u00a0%"
            rows.append((name, percent(change.after, 2), f"before {percent(change.before, 2)}"))
    if report.float_accuracy is not None:
        rows.append(("Float network", percent(report.float_accuracy, 2), "before quantization"))
    epochs = report.updates / report.per_epoch
    rows.append(("Training", report.times["in all"], f"{report.updates:,} updates, {epochs:.3g} epochs"))
    return rows
