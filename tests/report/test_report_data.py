"""ReportData: what it refuses, and that JSON loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bitdial.errors import BitdialError, DataError
from bitdial.report import (
    Ablation,
    Baseline,
    CurvePoint,
    FloatOp,
    LayerInfo,
    ReportData,
    Saturation,
    Search,
    SearchGeneration,
)

shares = st.floats(0.0, 1.0)
names = st.text(max_size=12)


@st.composite
def layers(draw: st.DrawFn, n_ratios: int) -> LayerInfo:
    n_groups = draw(st.integers(0, 4))
    widths = draw(st.lists(st.integers(1, 5), min_size=n_groups, max_size=n_groups))
    bounds = [0, *np.cumsum(widths).tolist()] if n_groups else []
    signed = draw(st.booleans())
    return LayerInfo(
        name=draw(names),
        source=draw(names),
        kind=draw(st.sampled_from(("conv", "linear", "matmul"))),
        macs=draw(st.integers(0, 10**12)),
        eligible=draw(st.booleans()),
        n_groups=n_groups,
        low=[draw(st.lists(st.booleans(), min_size=n_groups, max_size=n_groups)) for _ in range(n_ratios)],
        activation_shift=draw(st.lists(st.integers(0, 8), min_size=n_groups, max_size=n_groups)),
        weight_shift_histogram=draw(st.dictionaries(st.integers(0, 8), st.integers(0, 99), max_size=3)),
        channel_ranges=[draw(st.floats(0.0, 127.0)) for _ in range(bounds[-1] if bounds else 0)],
        group_bounds=bounds,
        unused_bits_weights={draw(st.integers(0, 7)): draw(shares)},
        signed=signed,
        amax=draw(st.integers(0, 127)),
    )


@st.composite
def reports(draw: st.DrawFn) -> ReportData:
    ratios = sorted(draw(st.sets(shares, min_size=1, max_size=4)))
    maybe = st.none() | shares
    curve = [
        CurvePoint(
            ratio=r,
            accuracy=draw(maybe),
            agreement=draw(maybe),
            low_share=draw(shares),
            eligible_share=draw(shares),
            distance=draw(maybe),
        )
        for r in ratios
    ]
    return ReportData(
        title=draw(names),
        model=draw(names),
        provenance=draw(st.dictionaries(names, names | st.integers(-5, 5) | st.none(), max_size=3)),
        ratios=ratios,
        curve=curve,
        baselines=[Baseline(label=draw(names), accuracy=draw(maybe), agreement=draw(maybe), ratio=draw(maybe))],
        layers=[draw(layers(len(ratios)))],
        float_ops=[FloatOp(node=draw(names), op="op", source=draw(names), reason=draw(names))],
        saturation=[Saturation(layer=draw(names), ratio=draw(shares), saturated=3, total=7)],
        ablation=[
            Ablation(
                factor=draw(names),
                setting=draw(names),
                accuracy={r: draw(shares) for r in ratios},
                standard_error=draw(maybe),
                n_images=10,
            )
        ],
        search=Search(
            history=[
                SearchGeneration(target=draw(shares), generation=0, best=draw(st.floats(-5, 5)), mean=None, n_images=3)
            ],
            statistics={"seconds": 1.5},
        ),
    )


@given(reports())
def test_json_gives_back_an_equal_report(data: ReportData) -> None:
    assert ReportData.from_json(data.to_json()) == data
    assert ReportData.from_json(data.to_json().encode()).to_json() == data.to_json()


def test_the_example_survives_json(example: ReportData) -> None:
    assert ReportData.from_json(example.to_json()) == example


def test_numpy_values_become_plain_ones() -> None:
    point = CurvePoint(
        ratio=np.float32(0.5),
        accuracy=np.float64(0.25),
        agreement=None,
        low_share=np.float64(0.1),
        eligible_share=np.int64(1),
    )
    layer = LayerInfo(name="a", source="a", kind="conv", n_groups=np.int32(2), low=np.array([[True, False]]))  # type: ignore[arg-type]
    data = ReportData(title="t", model="m", curve=iter([point]), layers=[layer])  # type: ignore[arg-type]
    assert type(data.curve[0].eligible_share) is float and type(data.layers[0].low[0][0]) is bool
    assert json.loads(data.to_json())["layers"][0]["low"] == [[True, False]]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: CurvePoint(ratio=1.5, accuracy=None, agreement=None, low_share=0, eligible_share=0),
            "CurvePoint.ratio: Input should be less than or equal to 1 (got 1.5)",
        ),
        (lambda: CurvePoint(ratio=0.5, accuracy=87.0, agreement=None, low_share=0, eligible_share=0), "accuracy"),
        (
            lambda: CurvePoint(ratio=0.5, accuracy=float("nan"), agreement=None, low_share=0, eligible_share=0),
            "CurvePoint.accuracy",
        ),
        (lambda: CurvePoint(ratio=0.5, accuracy=True, agreement=None, low_share=0, eligible_share=0), "accuracy"),
        (
            lambda: CurvePoint(ratio=0.5, accuracy=None, agreement=None, low_share=0, eligible_share=0, distance=-1.0),
            "distance",
        ),
        (lambda: Baseline(label=None, accuracy=0.5), "label"),  # type: ignore[arg-type]
        (lambda: Saturation(layer="conv", ratio=0.5, saturated=8, total=7), "8 values of 7"),
        (lambda: Ablation(factor="f", setting="s", accuracy={2.0: 0.5}), "accuracy"),
        (lambda: LayerInfo(name="conv", source="", kind="conv", n_groups=2, low=[[True]]), "1 entries for 2 groups"),
        (lambda: LayerInfo(name="conv", source="", kind="conv", n_groups=2, group_bounds=[0, 4, 4]), "ascend"),
        (lambda: LayerInfo(name="conv", source="", kind="conv", channel_ranges=[256.0]), "0..255"),
        (lambda: LayerInfo(name="conv", source="", kind="conv", channel_ranges=[200.0], signed=True), "0..127"),
        (
            lambda: LayerInfo(
                name="conv", source="", kind="conv", n_groups=1, group_bounds=[0, 2], channel_ranges=[1.0]
            ),
            "cover 2",
        ),
        (lambda: LayerInfo(name="conv", source="", kind="conv", unused_bits_weights={0: 0.7, 1: 0.7}), "more than 1"),
        (lambda: LayerInfo(name="conv", source="", kind="conv", macs=-1), "macs"),
        (lambda: ReportData(title="t", model="m", ratios=[0.5, 0.5]), "differ"),
        (lambda: ReportData(title="t", model="m", ratios=[1.0, 0.0]), "ascend"),
        (
            lambda: ReportData(
                title="t", model="m", ratios=[0.5], layers=[LayerInfo(name="c", source="", kind="conv", low=[[], []])]
            ),
            "2 rows",
        ),
        (lambda: ReportData(title="t", model="m", curve="abc"), "curve"),  # type: ignore[arg-type]
        (lambda: ReportData(title="t", model="m", provenance={"x": object()}), "JSON cannot store"),
        (lambda: ReportData(title="t", model="m", provenance={"x": float("inf")}), "finite"),
        (lambda: ReportData(title="t", model="m", baselines=[{"label": "a"}]), "Baseline.accuracy: Field required"),  # type: ignore[list-item]
        (
            lambda: ReportData(title="t", model="m", baselines=[{"label": "a", "accuracy": 0, "x": 1}]),
            "Baseline.x: Extra inputs",
        ),  # type: ignore[list-item]
    ],
)
def test_bad_data_are_named(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        make()
    assert told in str(caught.value) and isinstance(caught.value, BitdialError)


def test_endless_nesting_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"deeper": nested}
    with pytest.raises(DataError, match="levels deep"):
        ReportData(title="t", model="m", layout=nested)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[]", "format"),
        ('{"format": "other"}', "format"),
        ('{"format": "bitdial-report", "version": 2}', "version 2"),
        ('{"format": "bitdial-report", "version": 1, "title": "t"}', "ReportData.model: Field required"),
        ('{"format": "bitdial-report", "version": 1, "title": 3, "model": ""}', "title"),
        ('{"format": "bitdial-report", "version": 1, "title": "", "model": "", "n_images": NaN}', "NaN"),
        ('{"format": "bitdial-report", "version": 1, "title": "", "model": "", "n_images": 1e999}', "integer"),
        ('{"format": "bitdial-report", "version": 1, "title": "", "model": "", "extra": 1}', "ReportData.extra"),
    ],
)
def test_other_json_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(DataError) as caught:
        ReportData.from_json(text)
    assert told in str(caught.value)


def test_reports_do_not_change(example: ReportData) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        example.title = "x"  # type: ignore[misc]
