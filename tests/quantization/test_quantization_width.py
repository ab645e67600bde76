"""low_bits = "auto": the widest operands whose fastest exact mechanism is about as fast as at 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.exactness import exact_mechanisms
from bitdial.quantization.latency_table import LatencyTable, LayerShape, LayerTimes
from bitdial.quantization.width import candidate_widths, choose_width

CONV = LayerShape(
    op="conv", in_channels=64, out_channels=64, in_size=(8, 8), out_size=(8, 8), kernel=(3, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1),
)  # fmt: skip
LINEAR = LayerShape(op="linear", in_channels=64, out_channels=64, in_size=(1,), out_size=(1,))


def table_of(shape: LayerShape, **seconds: float) -> LatencyTable:
    times = LayerTimes(shape=shape, seconds=seconds)
    return LatencyTable(target="t", cpu="", isa="", threads=1, batch=1, layers={shape.key: times})


@pytest.mark.parametrize(
    "seconds, signed, expected",
    [
        # (amax, wmax, mechanism)
        ({"direct": 2.0, "fip": 1.5, "winograd": 1.0}, False, (63, 14, "winograd")),
        ({"direct": 2.0, "fip": 1.5, "winograd": 1.0}, True, (31, 14, "winograd")),
        ({"direct": 2.0, "fip": 1.4, "winograd": 1.3, "winograd_fip": 1.0}, False, (31, 7, "winograd_fip")),
        ({"direct": 2.0, "fip": 1.4, "winograd": 1.3, "winograd_fip": 1.0}, True, (15, 7, "winograd_fip")),
        ({"direct": 2.0, "fip": 1.4, "winograd": 1.14, "winograd_fip": 1.0}, False, (63, 14, "winograd")),
        ({"direct": 2.0, "fip": 1.14, "winograd": 1.3, "winograd_fip": 1.0}, False, (63, 63, "fip")),
        ({"direct": 1.0, "winograd": 1.2}, False, (127, 63, "direct")),  # nothing gained: nothing lost
        ({"direct": 1.14, "winograd": 1.0}, False, (127, 63, "direct")),
    ],
)
def test_wider_where_it_costs_no_time(seconds: dict[str, float], signed: bool, expected: tuple[Any, ...]) -> None:
    found = choose_width(CONV, signed, table_of(CONV, **seconds), 1.15)
    assert (found.amax, found.wmax, found.mechanism) == expected
    assert found.estimated_from is None and found.seconds_4bit == min(seconds.values())
    assert found.summary()["amax"] == found.amax


def test_linear_layers_have_no_winograd() -> None:
    found = choose_width(LINEAR, False, table_of(LINEAR, direct=1.3, fip=1.0), 1.15)
    assert (found.amax, found.wmax, found.mechanism) == (63, 63, "fip")


def test_deep_layers_whose_winograd_sums_would_leave_int32_do_without() -> None:
    deep = CONV.model_copy(update={"in_channels": 4096})
    found = choose_width(deep, False, table_of(deep, direct=2.0, fip=1.5, winograd=1.0), 1.15)
    assert found.mechanism == "fip" and found.seconds_4bit == 1.5


def test_a_shape_of_the_kind_says_so() -> None:
    other = CONV.model_copy(update={"in_channels": 128})
    found = choose_width(other, False, table_of(CONV, direct=2.0, winograd=1.0), 1.15)
    assert found.estimated_from == CONV.key and found.seconds == pytest.approx(2.0)


@given(
    st.booleans(),
    st.floats(1.0, 2.0),
    st.fixed_dictionaries(
        {"direct": st.floats(0.1, 3)},
        optional={name: st.floats(0.1, 3) for name in ("fip", "winograd", "winograd_fip")},
    ),
)
def test_no_width_of_less_error_meets_the_tolerance(signed: bool, tolerance: float, seconds: dict[str, float]) -> None:
    table = table_of(CONV, **seconds)
    found = choose_width(CONV, signed, table, tolerance)

    def time(amax: int, wmax: int) -> float:
        names = exact_mechanisms(amax, wmax, signed, (3, 3), (1, 1))
        return min(seconds[n] for n in names & set(seconds))

    four = time(7 if signed else 15, 7)
    assert found.seconds == time(found.amax, found.wmax) <= tolerance * four
    for amax, wmax in candidate_widths(signed):
        if amax**-2 + wmax**-2 < found.amax**-2 + found.wmax**-2:
            assert time(amax, wmax) > tolerance * four
    assert found.amax >= (7 if signed else 15) and found.wmax >= 7


def test_no_candidate_clips_more_weights_than_4_bits_do() -> None:
    for signed in (False, True):
        for _, wmax in candidate_widths(signed):
            assert wmax << naive_shift(True, wmax) >= 7 << naive_shift(True, 7)
