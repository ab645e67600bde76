"""What a report shows, as plain data: filled in by the pipeline, stored as JSON, read by every renderer.

All records are immutable and check themselves when made: a wrong type, a share outside 0..1 or lists whose lengths
disagree raise DataError with the field's name. Sequences may be any iterable and are kept as tuples. Every part but the
title and the model's name may be left empty; a report then has no such section.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from bitdial.errors import DataError
from bitdial.report.fields import (
    Bool,
    Count,
    FreeDict,
    Many,
    Real,
    Record,
    Share,
    ShareKey,
    Shift,
    ShiftKey,
    Sorted,
    Text,
)

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "bitdial-report"
VERSION = 1


class CurvePoint(Record):
    """One setting of the dial.

    ratio           the setting, 0..1
    accuracy        0..1, or None when no labels were at hand
    agreement       share of inputs with the same top answer as the 8-bit model, 0..1, or None
    low_share       share of the multiply-accumulates of all layers that run at low precision
    eligible_share  the same share, of the layers that may run low
    distance        L2 distance of the soft labels to the 8-bit model's, or None
    """

    ratio: Share
    accuracy: Share | None
    agreement: Share | None
    low_share: Share
    eligible_share: Share
    distance: Annotated[Real, Field(ge=0.0)] | None = None


class Baseline(Record):
    """A result to hold the curve against. With a ratio it is a point of its own curve, grouped by label."""

    label: Text
    accuracy: Share | None
    agreement: Share | None = None
    ratio: Share | None = None


class LayerInfo(Record):
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

    name: Text
    source: Text
    kind: Text
    shape: Text = ""
    macs: Count = 0
    eligible: Bool = False
    reason: Text = ""
    n_groups: Count = 0
    low: Annotated[Sequence[Annotated[Sequence[Bool], Many]], Many] = ()
    activation_shift: Annotated[Sequence[Shift], Many] = ()
    weight_shift_histogram: Annotated[dict[ShiftKey, Count], Sorted] = {}
    channel_ranges: Annotated[Sequence[Annotated[Real, Field(ge=0.0)]], Many] = ()
    group_bounds: Annotated[Sequence[Count], Many] = ()
    unused_bits_activations: Annotated[dict[ShiftKey, Share], Sorted] = {}
    unused_bits_weights: Annotated[dict[ShiftKey, Share], Sorted] = {}
    engine: Text = ""
    float_reason: Text = ""
    signed: Bool = False
    amax: Annotated[Count, Field(le=255)] = 0
    wmax: Annotated[Count, Field(le=127)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        what = f"layer {self.name!r:.80}: "
        limit = 127.0 if self.signed else 255.0
        outside = next((v for v in self.channel_ranges if not v <= limit), None)
        if outside is not None:
            raise DataError(f"{what}channel_ranges has {outside:g}, outside 0..{limit:g}")
        for i, row in enumerate(self.low):
            if len(row) != self.n_groups:
                raise DataError(f"{what}low[{i}] has {len(row)} entries for {self.n_groups} groups")
        if self.activation_shift and len(self.activation_shift) != self.n_groups:
            count = len(self.activation_shift)
            raise DataError(f"{what}activation_shift has {count} entries for {self.n_groups} groups")
        bounds = self.group_bounds
        if bounds:
            ascending = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
            if len(bounds) != self.n_groups + 1 or bounds[0] != 0 or not ascending:
                raise DataError(
                    f"{what}group_bounds must ascend from 0 and have n_groups + 1 = {self.n_groups + 1} entries"
                )
            if self.channel_ranges and len(self.channel_ranges) != bounds[-1]:
                count = len(self.channel_ranges)
                raise DataError(f"{what}{count} channel ranges, but the groups cover {bounds[-1]} channels")
        for label, histogram in (("activation", self.unused_bits_activations), ("weight", self.unused_bits_weights)):
            if sum(histogram.values()) > 1.001:
                raise DataError(f"{what}the shares of unused {label} bits add up to more than 1")
        return self

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


class FloatOp(Record):
    """An operator that runs in float: node name, operator, module path in the user's model, why."""

    node: Text
    op: Text
    source: Text
    reason: Text


class Saturation(Record):
    """How many low values of a layer hit the end of their range at a ratio, of how many."""

    layer: Text
    ratio: Share
    saturated: Count
    total: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.saturated > self.total:
            raise DataError(f"saturation of layer {self.layer!r:.80}: {self.saturated} values of {self.total}")
        return self


class Ablation(Record):
    """One row of the ablation table. The row with factor "baseline" is what the others are compared with.

    standard_error is of one accuracy, 0..1, or None; n_images the size of the evaluation set (0 where unknown).
    """

    factor: Text
    setting: Text
    accuracy: Annotated[dict[ShareKey, Share], Sorted]
    standard_error: Share | None = None
    n_images: Count = 0


class SearchGeneration(Record):
    """Fitness (distance to the 8-bit model; lower is better) of one generation of the search for one target ratio."""

    target: Share
    generation: Count
    best: Real
    mean: Real | None = None
    n_images: Count = 0


class Search(Record):
    """History of the search and what it cost.

    statistics is free-form; the report gives units to keys that hold "seconds", "bytes" or "share".
    """

    history: Annotated[Sequence[SearchGeneration], Many] = ()
    statistics: FreeDict = {}


class Answers(Record):
    """What each ratio keeps of the 8-bit model's answers on the calibration samples.

    ratios, kept   per ratio the share that is kept
    ceiling        the highest ratio that keeps what is wanted; wanted: that share
    what           what is kept, in words
    """

    ratios: Annotated[Sequence[Share], Many]
    kept: Annotated[Sequence[Share], Many]
    ceiling: Share
    wanted: Share
    what: Text

    @model_validator(mode="after")
    def _check(self) -> Self:
        _distinct(self.ratios, "the answers")
        if not self.ratios or len(self.kept) != len(self.ratios):
            raise DataError(f"{len(self.kept)} shares of kept answers for {len(self.ratios)} ratios")
        return self


class ReportData(Record):
    """Everything a report shows.

    created      ISO 8601 time, given by the caller so that equal inputs give equal reports
    ratios       the dial's settings, ascending; `low` of each layer has one row per entry. Empty: those of the curve
    n_images     size of the evaluation set of `curve` and `baselines`; 0 where unknown
    """

    title: Text
    model: Text
    created: Text = ""
    provenance: FreeDict = {}
    ratios: Annotated[Sequence[Share], Many] = ()
    curve: Annotated[Sequence[CurvePoint], Many] = ()
    baselines: Annotated[Sequence[Baseline], Many] = ()
    n_images: Count = 0
    layers: Annotated[Sequence[LayerInfo], Many] = ()
    float_ops: Annotated[Sequence[FloatOp], Many] = ()
    saturation: Annotated[Sequence[Saturation], Many] = ()
    ablation: Annotated[Sequence[Ablation], Many] = ()
    search: Search = Search()
    layout: FreeDict = {}
    answers: Answers | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        curve = tuple(sorted(self.curve, key=lambda p: p.ratio))
        ratios = self.ratios or tuple(p.ratio for p in curve)
        object.__setattr__(self, "curve", curve)
        object.__setattr__(self, "ratios", ratios)
        _distinct([p.ratio for p in curve], "curve")
        _distinct(ratios, "ratios")
        for layer in self.layers:
            if layer.low and len(layer.low) != len(ratios):
                told = f"low has {len(layer.low)} rows for {len(ratios)} ratios"
                raise DataError(f"layer {layer.name!r:.80}: {told}")
        return self

    def to_json(self) -> str:
        """The report's data as JSON text; `from_json` gives back an equal object."""
        content = {"format": FORMAT, "version": VERSION, **self.model_dump()}
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
        return cls(**content)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def _distinct(ratios: Iterable[float], what: str) -> None:
    listed = list(ratios)
    if any(a >= b for a, b in zip(listed, listed[1:], strict=False)):
        raise DataError(f"the ratios of {what} must ascend and differ from each other: {listed}")
