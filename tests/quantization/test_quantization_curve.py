"""What decisions make of a measured curve, and what quantizing says about the answers that ratios keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.quantization.answers import OUTPUTS, TOP_ANSWERS, KeptAnswers
from bitdial.quantization.curve import column, losses, non_increasing, rise_remark, sample_count

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = (0.9889, 0.9889, 0.9889, 0.9889, 0.9917)  # accuracy that rises at 100 %: one image more of 360


@given(st.lists(st.one_of(st.none(), st.floats(0.0, 1.0)), max_size=8))
def test_the_curve_for_decisions_never_rises_nor_promises_more_than_was_measured(shares: list[float | None]) -> None:
    made = non_increasing(shares)
    known = [(m, s) for m, s in zip(made, shares, strict=True) if m is not None and s is not None]
    assert [m is None for m in made] == [s is None for s in shares] and all(m <= s for m, s in known)
    assert all(a[0] >= b[0] for a, b in zip(known, known[1:], strict=False))
    assert non_increasing(made) == made
    if known and all(a[1] >= b[1] for a, b in zip(known, known[1:], strict=False)):
        assert list(made) == list(shares)  # a curve that falls is left as it is


def test_where_accuracy_is_flat_agreement_decides() -> None:
    agreement = (1.0, 0.999, 0.999, 0.99, 0.995)  # the rise at 100 % is noise too
    flat = losses(DIGITS, agreement, 360)
    assert flat == pytest.approx((0.0, *(math.sqrt(d / 360) for d in (0.001, 0.001, 0.01, 0.01))))
    assert losses(DIGITS, agreement, 36_000) == pytest.approx([v / 10 for v in flat or ()])  # more images, less doubt
    # A loss that was measured beyond doubt is what it is.
    assert losses((0.90, 0.89, 0.88, 0.87, 0.80), agreement, 10_000) == pytest.approx((0.0, 0.01, 0.02, 0.03, 0.10))
    assert losses((0.9, 0.9, None, 0.9, 0.9), agreement, 360) is None
    assert losses(DIGITS, (None,) * 5, None) == (0.0,) * 5


def test_reading_a_stored_curve_leaves_out_what_is_no_share() -> None:
    rows: list[dict[str, Any]] = [
        {"ratio": 0.0, "accuracy": 0.9, "samples": 360}, {"ratio": 0.25, "accuracy": 31.5, "samples": 360},
        {"ratio": 0.5 + 1e-12, "accuracy": 1, "samples": 360}, {"ratio": 0.75, "accuracy": True, "samples": 360},
        {"ratio": "1.0", "accuracy": 0.9, "samples": 360}, {"label": "float32", "accuracy": 0.95, "samples": 360},
    ]  # fmt: skip
    assert column(rows, RATIOS, "accuracy") == (0.9, None, 1.0, None, None)
    assert sample_count(rows) == 360 and sample_count([*rows, {"samples": 10}]) is None and sample_count([]) is None


def test_a_rise_is_told() -> None:
    assert "0.28 points" in rise_remark(DIGITS)
    assert rise_remark((0.9, None, 0.9, 0.8)) == "" == rise_remark(())


# ---- answers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "samples", "ceiling"),
    [
        ((1.0, 1.0, 0.99, 0.98, 0.10), 256, 0.75),
        ((1.0, 0.5, 1.0, 1.0, 1.0), 256, 0.0),  # what lies above a ratio of no use is of none either
        ((1.0, 1.0, 1.0, 1.0, 31 / 32), 32, 1.0),  # one answer of 32 is 3 %, and chance
        ((1.0, 1.0, 1.0, 1.0, 28 / 32), 32, 0.75),
        ((1.0, 1.0, 1.0, 1.0, 31 / 32), 10_000, 1.0),
        ((1.0, 1.0, 1.0, 1.0, 0.965), 10_000, 0.75),
    ],
)
def test_the_ceiling_is_the_highest_ratio_that_keeps_the_answers(
    kept: tuple[float, ...], samples: int, ceiling: float
) -> None:
    found = KeptAnswers.judged(RATIOS, kept, TOP_ANSWERS, samples, 0.97)
    assert found.ceiling == ceiling and KeptAnswers.from_json(found.as_json()) == found
    assert bool(found.warning()) == (ceiling < 1.0) and f"{100 * ceiling:g} %" in found.summary()
    assert KeptAnswers.judged(RATIOS, kept, TOP_ANSWERS, samples, 0.0).ceiling == 1.0


def test_outputs_without_classes_are_judged_as_they_are() -> None:
    found = KeptAnswers.judged(RATIOS, (1.0, 0.99, 0.98, 0.969, 0.9), OUTPUTS, 32, 0.97)
    assert found.ceiling == 0.5 and "96.9 % at 75 %, 90 % at 100 %" in found.warning() and "is 50 %" in found.warning()
    assert found.restricted(RATIOS[1:4]).ceiling == 0.5
    assert found.restricted(RATIOS[3:]).ceiling == 0.75  # something must run


@pytest.mark.parametrize(
    "change",
    [
        {"by": "faith"}, {"samples": 0}, {"samples": True}, {"samples": 1.5}, {"wanted": 1.5}, {"wanted": None}, {"ratios": []},
        {"kept": [1.0]}, {"kept": [1.0, 1.0, 1.0, 1.0, 2.0]}, {"kept": [1.0, 1.0, 1.0, 1.0, float("nan")]}, {"kept": "11111"},
        {"ceiling": 0.6}, {"ceiling": None}, {"ceiling": [1.0]}, {"more": 1},
    ],
)  # fmt: skip
def test_malformed_records_are_refused(change: dict[str, Any]) -> None:
    sound = KeptAnswers.judged(RATIOS, (1.0,) * 5, TOP_ANSWERS, 256, 0.97).as_json()
    with pytest.raises(ValueError):
        KeptAnswers.from_json({**sound, **change})
    with pytest.raises(ValueError):
        KeptAnswers.from_json(sorted(sound))
