"""What a report shows, as plain data: filled in by the pipeline, stored as JSON, read by every renderer.

All classes are frozen and check themselves when made: a wrong type, a share outside 0..1 or lists whose lengths
disagree raise DataError with the field's name. Sequences may be any iterable and are kept as tuples. Every part but the
title and the model's name may be left empty; a report then has no such section.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitdial.errors import DataError
from bitdial.report.fields import (
    boolean,
    free_dict,
    integer,
    mapping,
    optional,
    real,
    record,
    records,
    sequence,
    share,
    text,
)

FORMAT = "bitdial-report"
VERSION = 1


def _put(instance: Any, **values: Any) -> None:
    """Store checked values in a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


@dataclass(frozen=True)
class CurvePoint:
    """One setting of the dial.

    ratio           the setting, 0..1
    accuracy        0..1, or None when no labels were at hand
    agreement       share of inputs with the same top answer as the 8-bit model, 0..1, or None
    low_share       share of the multiply-accumulates of all layers that run at low precision
    eligible_share  the same share, of the layers that may run low
    distance        L2 distance of the soft labels to the 8-bit model's, or None
    """

    ratio: float
    accuracy: float | None
    agreement: float | None
    low_share: float
    eligible_share: float
    distance: float | None = None

    def __post_init__(self) -> None:
        _put(
            self,
            ratio=share(self.ratio, "ratio of a curve point"),
            accuracy=optional(share, self.accuracy, "accuracy of a curve point"),
            agreement=optional(share, self.agreement, "agreement of a curve point"),
            low_share=share(self.low_share, "low_share of a curve point"),
            eligible_share=share(self.eligible_share, "eligible_share of a curve point"),
            distance=optional(lambda v, w: real(v, w, 0.0), self.distance, "distance of a curve point"),
        )


@dataclass(frozen=True)
class Baseline:
    """A result to hold the curve against. With a ratio it is a point of its own curve, grouped by label."""

    label: str
    accuracy: float | None
    agreement: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        label = text(self.label, "label of a baseline")
        _put(
            self,
            accuracy=optional(share, self.accuracy, f"accuracy of baseline {label!r:.60}"),
            agreement=optional(share, self.agreement, f"agreement of baseline {label!r:.60}"),
            ratio=optional(share, self.ratio, f"ratio of baseline {label!r:.60}"),
        )


@dataclass(frozen=True)
class LayerInfo:
    """One conv, linear or matmul.

    name, source             node name in the graph; module path in the user's model
    kind, shape              "conv", "linear", "matmul"; shape in words, e.g. "64x64x3x3"
    macs                     multiply-accumulates per sample
    eligible, reason         may run low; if not, why
    n_groups                 groups of feature channels
    low                      per ratio of the report, one bool per group: low at that ratio
    activation_shift         static shift of each group
    weight_shift_histogram   {shift: number of weight blocks}
    channel_ranges           largest magnitude per feature channel on calibration data, in 8-bit steps, in stored order
    group_bounds             group g = feature channels group_bounds[g] .. group_bounds[g+1]-1
    unused_bits_activations  {unused high bits: share of groups}
    unused_bits_weights      {unused high bits: share of (row, group) blocks}
    engine                   what executes the layer, in words
    float_reason             "" for a layer that runs in integers, else why it runs in float
    signed                   activations are -127..127 (7 magnitude bits), else 0..255
    amax, wmax               magnitude limits of low activations and weights; 0 where unknown
    """

    name: str
    source: str
    kind: str
    shape: str = ""
    macs: int = 0
    eligible: bool = False
    reason: str = ""
    n_groups: int = 0
    low: Sequence[Sequence[bool]] = ()
    activation_shift: Sequence[int] = ()
    weight_shift_histogram: Mapping[int, int] = field(default_factory=dict)
    channel_ranges: Sequence[float] = ()
    group_bounds: Sequence[int] = ()
    unused_bits_activations: Mapping[int, float] = field(default_factory=dict)
    unused_bits_weights: Mapping[int, float] = field(default_factory=dict)
    engine: str = ""
    float_reason: str = ""
    signed: bool = False
    amax: int = 0
    wmax: int = 0

    def __post_init__(self) -> None:
        name = text(self.name, "name of a layer")
        what = f"layer {name!r:.80}: "
        for attribute in ("source", "kind", "shape", "reason", "engine", "float_reason"):
            text(getattr(self, attribute), what + attribute)
        signed = boolean(self.signed, what + "signed")
        _put(
            self,
            macs=integer(self.macs, what + "macs"),
            eligible=boolean(self.eligible, what + "eligible"),
            n_groups=integer(self.n_groups, what + "n_groups"),
            low=sequence(lambda row, w: sequence(boolean, row, w), self.low, what + "low"),
            activation_shift=sequence(_shift, self.activation_shift, what + "activation_shift"),
            weight_shift_histogram=mapping(_shift, integer, self.weight_shift_histogram, what + "weight shifts"),
            channel_ranges=sequence(
                lambda v, w: real(v, w, 0.0, 127.0 if signed else 255.0), self.channel_ranges, what + "channel_ranges"
            ),
            group_bounds=sequence(integer, self.group_bounds, what + "group_bounds"),
            unused_bits_activations=mapping(
                _shift, share, self.unused_bits_activations, what + "unused activation bits"
            ),
            unused_bits_weights=mapping(_shift, share, self.unused_bits_weights, what + "unused weight bits"),
            signed=signed,
            amax=integer(self.amax, what + "amax", 0, 255),
            wmax=integer(self.wmax, what + "wmax", 0, 127),
        )
        self._check_lengths(what)

    def _check_lengths(self, what: str) -> None:
        for i, row in enumerate(self.low):
            if len(row) != self.n_groups:
                raise DataError(f"report data: {what}low[{i}] has {len(row)} entries for {self.n_groups} groups")
        if self.activation_shift and len(self.activation_shift) != self.n_groups:
            count = len(self.activation_shift)
            raise DataError(f"report data: {what}activation_shift has {count} entries for {self.n_groups} groups")
        bounds = self.group_bounds
        if bounds:
            ascending = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
            if len(bounds) != self.n_groups + 1 or bounds[0] != 0 or not ascending:
                raise DataError(
                    f"report data: {what}group_bounds must ascend from 0 and have n_groups + 1 = {self.n_groups + 1} "
                    "entries"
                )
            if self.channel_ranges and len(self.channel_ranges) != bounds[-1]:
                count = len(self.channel_ranges)
                raise DataError(
                    f"report data: {what}{count} channel ranges, but the groups cover {bounds[-1]} channels"
                )
        for label, histogram in (("activation", self.unused_bits_activations), ("weight", self.unused_bits_weights)):
            if sum(histogram.values()) > 1.001:
                raise DataError(f"report data: {what}the shares of unused {label} bits add up to more than 1")

    def group_weights(self) -> tuple[float, ...]:
        """Share of the layer's multiplies in each group: by its channels, or equal where bounds are unknown."""
        if not self.group_bounds:
            return (1.0 / self.n_groups,) * self.n_groups if self.n_groups else ()
        total = self.group_bounds[-1]
        return tuple((b - a) / total for a, b in zip(self.group_bounds, self.group_bounds[1:], strict=False))

    def low_fraction(self, ratio_index: int) -> float:
        """Share of the layer's multiplies that run low at a ratio."""
        if not self.low or self.float_reason:
            return 0.0
        return sum((w for w, low in zip(self.group_weights(), self.low[ratio_index], strict=True) if low), 0.0)


def _shift(value: Any, what: str) -> int:
    return integer(value, what, 0, 8)


@dataclass(frozen=True)
class FloatOp:
    """An operator that runs in float: node name, operator, module path in the user's model, why."""

    node: str
    op: str
    source: str
    reason: str

    def __post_init__(self) -> None:
        for attribute in ("node", "op", "source", "reason"):
            text(getattr(self, attribute), f"{attribute} of a float operator")


@dataclass(frozen=True)
class Saturation:
    """How many low values of a layer hit the end of their range at a ratio, of how many."""

    layer: str
    ratio: float
    saturated: int
    total: int

    def __post_init__(self) -> None:
        what = f"saturation of layer {text(self.layer, 'layer of a saturation count')!r:.80}"
        total = integer(self.total, f"{what}: total")
        _put(
            self,
            ratio=share(self.ratio, f"{what}: ratio"),
            total=total,
            saturated=integer(self.saturated, f"{what}: saturated", 0, total),
        )


@dataclass(frozen=True)
class Ablation:
    """One row of the ablation table. The row with factor "baseline" is what the others are compared with.

    standard_error is of one accuracy, 0..1, or None; n_images the size of the evaluation set (0 where unknown).
    """

    factor: str
    setting: str
    accuracy: Mapping[float, float]
    standard_error: float | None = None
    n_images: int = 0

    def __post_init__(self) -> None:
        what = f"ablation {text(self.factor, 'factor of an ablation')!r:.60}"
        text(self.setting, f"{what}: setting")
        _put(
            self,
            accuracy=mapping(share, share, self.accuracy, f"{what}: accuracy"),
            standard_error=optional(share, self.standard_error, f"{what}: standard_error"),
            n_images=integer(self.n_images, f"{what}: n_images"),
        )


@dataclass(frozen=True)
class SearchGeneration:
    """Fitness (distance to the 8-bit model; lower is better) of one generation of the search for one target ratio."""

    target: float
    generation: int
    best: float
    mean: float | None = None
    n_images: int = 0

    def __post_init__(self) -> None:
        _put(
            self,
            target=share(self.target, "target of a search generation"),
            generation=integer(self.generation, "generation number"),
            best=real(self.best, "best fitness"),
            mean=optional(lambda v, w: real(v, w), self.mean, "mean fitness"),
            n_images=integer(self.n_images, "n_images of a search generation"),
        )


@dataclass(frozen=True)
class Search:
    """History of the search and what it cost.

    statistics is free-form; the report gives units to keys that hold "seconds", "bytes" or "share".
    """

    history: Sequence[SearchGeneration] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _put(
            self,
            history=records(SearchGeneration, self.history, "search history"),
            statistics=free_dict(self.statistics, "search statistics"),
        )


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    created      ISO 8601 time, given by the caller so that equal inputs give equal reports
    ratios       the dial's settings, ascending; `low` of each layer has one row per entry. Empty: those of the curve
    n_images     size of the evaluation set of `curve` and `baselines`; 0 where unknown
    """

    title: str
    model: str
    created: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    ratios: Sequence[float] = ()
    curve: Sequence[CurvePoint] = ()
    baselines: Sequence[Baseline] = ()
    n_images: int = 0
    layers: Sequence[LayerInfo] = ()
    float_ops: Sequence[FloatOp] = ()
    saturation: Sequence[Saturation] = ()
    ablation: Sequence[Ablation] = ()
    search: Search = field(default_factory=Search)
    layout: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        curve = tuple(sorted(records(CurvePoint, self.curve, "curve"), key=lambda p: p.ratio))
        _distinct([p.ratio for p in curve], "curve")
        ratios = sequence(share, self.ratios, "ratios") or tuple(p.ratio for p in curve)
        _distinct(ratios, "ratios")
        for attribute in ("title", "model", "created"):
            text(getattr(self, attribute), attribute)
        layers = records(LayerInfo, self.layers, "layers")
        for layer in layers:
            if layer.low and len(layer.low) != len(ratios):
                raise DataError(
                    f"report data: layer {layer.name!r:.80}: low has {len(layer.low)} rows for {len(ratios)} ratios"
                )
        _put(
            self,
            provenance=free_dict(self.provenance, "provenance"),
            ratios=ratios,
            curve=curve,
            baselines=records(Baseline, self.baselines, "baselines"),
            n_images=integer(self.n_images, "n_images"),
            layers=layers,
            float_ops=records(FloatOp, self.float_ops, "float_ops"),
            saturation=records(Saturation, self.saturation, "saturation"),
            ablation=records(Ablation, self.ablation, "ablation"),
            search=record(Search, self.search, "search"),
            layout=free_dict(self.layout, "layout"),
        )

    def to_json(self) -> str:
        """The report's data as JSON text; `from_json` gives back an equal object."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, source: str | bytes) -> ReportData:
        """Read what `to_json` wrote. Raises DataError for anything else, a newer version included."""
        try:
            content = json.loads(source, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
            raise DataError(f"report data: not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f'report data: no "format": "{FORMAT}" at the top; was this file written by bitdial?')
        version = content.pop("version", None)
        if version != VERSION:
            raise DataError(f"report data: version {version!r:.40} is not {VERSION}; update bitdial or write it again")
        return record(cls, content, "the report")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def _distinct(ratios: Iterable[float], what: str) -> None:
    listed = list(ratios)
    if any(a >= b for a, b in zip(listed, listed[1:], strict=False)):
        raise DataError(f"report data: the ratios of {what} must ascend and differ from each other: {listed}")
