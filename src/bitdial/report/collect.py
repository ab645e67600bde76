"""From a quantized model and what was measured on it to the plain data that a report shows. NumPy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.describe import describe_low_weights
from bitdial.graph.ir import Node
from bitdial.graph.operators import CONTRACTIONS
from bitdial.quantization.answers import KEY, kept_answers
from bitdial.quantization.effective_bits import bit_length, group_maximum
from bitdial.quantization.instructions import Contract, Float, MatMul
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.report.data import (
    Ablation,
    Answers,
    Baseline,
    CurvePoint,
    FloatOp,
    LayerInfo,
    ReportData,
    Saturation,
    Search,
    SearchGeneration,
)

Row = Mapping[str, Any]

# Provenance that has its own section, or is too long for a list of facts.
_SHOWN_ELSEWHERE = frozenset({"channel_ranges", "search", "search_history", "layout", "evaluation", KEY})
_SAME_RATIO = 1e-9


def collect_report(
    program: Program,
    *,
    title: str,
    model: str = "",
    curve: Iterable[Row] | None = None,
    baselines: Iterable[Row] = (),
    saturation: Iterable[Row] = (),
    ablation: Iterable[Ablation] = (),
    n_images: int | None = None,
    engine: str = "reference",
    created: str = "",
) -> ReportData:
    """The report of a program.

    curve       rows as `benchmarking.accuracy.evaluate_curve` gives them ("ratio", "accuracy", "agreement", "distance",
                "samples"); None: those stored in the program. Shares of low multiplies are counted from the program
    baselines   rows with "label", "accuracy", and optionally "agreement" and "ratio"
    saturation  rows as `benchmarking.saturation.count_saturation` gives them
    n_images    None: the rows' "samples"
    engine      what executes the integer layers, in words
    created     ISO 8601 time

    Raises DataError for rows that hold something else.
    """
    rows = [row for row in (program.curve if curve is None else curve) if _is_ratio(row.get("ratio"))]
    names = _display_names(program)
    return ReportData(
        title=title,
        model=model,
        created=created,
        provenance=_provenance(program),
        ratios=program.ratios,
        curve=[_point(program, row) for row in rows],
        baselines=[
            Baseline(label=r["label"], accuracy=r.get("accuracy"), agreement=r.get("agreement"), ratio=r.get("ratio"))
            for r in baselines
        ],
        n_images=_samples(rows) if n_images is None else n_images,
        layers=_layers(program, engine),
        float_ops=_float_operators(program),
        saturation=[
            Saturation(
                layer=names.get(str(r["layer"]), str(r["layer"])),
                ratio=r["ratio"],
                saturated=r["saturated"],
                total=r["total"],
            )
            for r in saturation
        ],
        ablation=list(ablation),
        search=_search(program.provenance),
        layout=program.provenance.get("layout") or {},
        answers=_answers(program),
    )


def float_layer_macs(program: Program) -> dict[str, int]:
    """Multiply-accumulates per sample of each conv, linear and matmul that runs in float, by node name."""
    return {
        step.name: _macs(program, step.node)
        for step in program.instructions
        if isinstance(step, Float) and step.operation in CONTRACTIONS
    }


def low_share_of_all(program: Program, ratio_index: int) -> float:
    """Share of the multiply-accumulates of all layers, those in float included, that run low at a ratio."""
    integer = sum(layer.macs for layer in program.layers.values())
    total = integer + sum(float_layer_macs(program).values())
    return program.low_share(ratio_index) * integer / total if total else 0.0


def unused_activation_bits(
    layer: QuantizedLayer, channel_max: npt.NDArray[np.float64], signed: bool
) -> dict[int, float]:
    """{unused high bits: share of the layer's groups}, from the largest magnitude of each channel in 8-bit steps."""
    largest = np.rint(group_maximum(channel_max, layer.group_bounds))
    return _shares((7 if signed else 8) - bit_length(largest))


def unused_weight_bits(layer: QuantizedLayer) -> dict[int, float]:
    """{unused high bits: share of the (output row, group) blocks}; weights have 7 magnitude bits."""
    if layer.weight is None or not layer.n_groups:
        return {}
    rows, columns = layer.weight.shape[:2]
    largest = np.abs(layer.weight.reshape(rows, columns, -1).astype(np.int16)).max(axis=2)
    local = layer.group_bounds[: layer.weight_shift.shape[1]].astype(np.int64)
    return _shares(7 - bit_length(np.maximum.reduceat(largest, local, axis=1)))


def _shares(unused: npt.NDArray[np.int64]) -> dict[int, float]:
    bits, counts = np.unique(np.maximum(unused, 0), return_counts=True)
    return {int(b): float(c) / unused.size for b, c in zip(bits, counts, strict=True)}


def _is_ratio(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _samples(rows: Sequence[Row]) -> int:
    """The number of images all rows were measured on; 0 if they differ or do not say."""
    counts = {row.get("samples") for row in rows}
    only = counts.pop() if len(counts) == 1 else None
    return only if isinstance(only, int) else 0


def _point(program: Program, row: Row) -> CurvePoint:
    ratio = float(row["ratio"])
    index = next((i for i, r in enumerate(program.ratios) if abs(r - ratio) < _SAME_RATIO), None)
    if index is None:  # measured at a ratio that this program (perhaps cut to a band) does not have
        low, eligible = row.get("low_share", 0.0), row.get("eligible_share", 0.0)
    else:
        ratio, low, eligible = program.ratios[index], low_share_of_all(program, index), program.eligible_share(index)
    return CurvePoint(
        ratio=ratio,
        accuracy=row.get("accuracy"),
        agreement=row.get("agreement"),
        low_share=low,
        eligible_share=eligible,
        distance=row.get("distance"),
    )


def _display_names(program: Program) -> dict[str, str]:
    """Node name -> module path where that is known and belongs to one layer only."""
    sources = {s.name: s.source for s in program.instructions if isinstance(s, (Contract, MatMul))}
    count = Counter(sources.values())
    return {name: source for name, source in sources.items() if source and count[source] == 1}


def _layers(program: Program, engine: str) -> list[LayerInfo]:
    ranges = program.provenance.get("channel_ranges")
    in_float = float_layer_macs(program)
    result = []
    for step in program.instructions:
        if isinstance(step, (Contract, MatMul)):
            stored = ranges.get(step.name) if isinstance(ranges, Mapping) else None
            result.append(_integer_layer(program, step, stored, engine))
        elif isinstance(step, Float) and step.name in in_float:
            weight = program.constants.get(step.node.weight or "")
            result.append(
                LayerInfo(
                    name=step.name,
                    source=step.source,
                    kind=step.operation,
                    shape=_shape(program, step.name, weight),
                    macs=in_float[step.name],
                    float_reason=step.reason or "no integer form",
                    engine="torch, float32",
                )  # fmt: skip
            )
    return result


def _integer_layer(program: Program, step: Contract | MatMul, stored: Sequence[float] | None, engine: str) -> LayerInfo:
    layer, signed = step.layer, program.qparams[step.inputs[0]].signed
    channels = int(layer.group_bounds[-1])
    known = layer.n_groups > 0 and stored is not None and len(stored) == channels
    maxima = np.clip(np.asarray(stored, np.float64), 0, 127 if signed else 255) if known else np.zeros(0)
    shifts, counts = np.unique(layer.weight_shift, return_counts=True)
    return LayerInfo(
        name=layer.name,
        source=step.source,
        kind=layer.kind,
        shape=_shape(program, step.name, layer.weight),
        macs=layer.macs,
        eligible=layer.eligible,
        reason=layer.reason,
        n_groups=layer.n_groups,
        low=layer.low.tolist(),
        activation_shift=layer.activation_shift.tolist(),
        weight_shift_histogram={int(s): int(c) for s, c in zip(shifts, counts, strict=True)},
        channel_ranges=maxima.tolist(),
        group_bounds=layer.group_bounds.tolist() if layer.n_groups else (),
        unused_bits_activations=unused_activation_bits(layer, maxima, signed) if known else {},
        unused_bits_weights=unused_weight_bits(layer),
        engine=engine,
        signed=signed,
        amax=layer.amax,
        wmax=layer.wmax,
    )


def _shape(program: Program, name: str, weight: npt.NDArray[Any] | None) -> str:
    """Weight shape as "64x64x3x3"; for a matmul the output's type."""
    if weight is not None:
        return "x".join(str(n) for n in weight.shape)
    return str(program.types[name]) if name in program.types else ""


def _macs(program: Program, node: Node) -> int:
    """Multiply-accumulates per sample: output elements times the length of each one's sum."""
    types = program.types
    outputs = types[node.name].elements
    if node.weight is not None:
        shape = program.constants[node.weight].shape if node.weight in program.constants else ()
        return outputs * math.prod(shape[1:]) if shape else 0
    depth = types[node.inputs[0]].shape[-1]
    return outputs * depth if isinstance(depth, int) else 0


def _float_operators(program: Program) -> list[FloatOp]:
    return [
        FloatOp(node=s.name, op=s.operation, source=s.source, reason=s.reason)
        for s in program.instructions
        if isinstance(s, Float) and s.reason
    ]


def _search(provenance: Mapping[str, Any]) -> Search:
    summary = provenance.get("search") or {}
    statistics: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):  # deviation of the fast evaluation from the exact one
            statistics.update({k: v for k, v in value.items() if k.startswith("largest")})
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and key != "seed":
            statistics[key] = value
    history = [
        SearchGeneration(
            target=row["target"],
            generation=row["generation"],
            best=row["best"],
            mean=row.get("mean"),
            n_images=row.get("n_images", 0),
        )
        for row in provenance.get("search_history") or ()
        if row.get("best") is not None
    ]
    return Search(history=history, statistics=statistics)


def _answers(program: Program) -> Answers | None:
    kept = kept_answers(program)
    if kept is None:
        return None
    return Answers(ratios=kept.ratios, kept=kept.kept, ceiling=kept.ceiling, wanted=kept.wanted, what=kept.what)


def _provenance(program: Program) -> dict[str, Any]:
    shown = {k: v for k, v in program.provenance.items() if k not in _SHOWN_ELSEWHERE}
    calibration = shown.get("calibration")
    if isinstance(calibration, Mapping):
        shown["calibration"] = {k: v for k, v in calibration.items() if k != "ranges"}
    finetuning = shown.get("finetuning")
    if isinstance(finetuning, Mapping):
        kept = ("config", "data", "updates", "best_update", "stopped", "seconds")
        shown["finetuning"] = {k: finetuning[k] for k in kept if k in finetuning}
    low = describe_low_weights(program)
    if low["kind"] != "none":
        shown["low_weights"] = {k: v for k, v in low.items() if v}
    return shown
