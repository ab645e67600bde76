from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.cli.reading import parse_band, parse_numbers, parse_ratios, parse_share, parse_size
from bitdial.cli.terminal import duration, percent, plain, safe, size_name
from bitdial.errors import ConfigError


@given(st.floats(0.0, 1.0))
def test_shares_up_to_one_are_taken_as_they_are(value: float) -> None:
    assert parse_share(repr(value), "--ratios") == value


@given(st.floats(1.0, 100.0, exclude_min=True))
def test_numbers_above_one_are_percent(value: float) -> None:
    assert parse_share(repr(value), "--ratios") == value / 100


@given(st.floats(0.0, 100.0))
def test_a_percent_sign_always_means_percent(value: float) -> None:
    assert parse_share(f"{value!r}%", "--ratios") == value / 100
    assert parse_share(f" {value!r} % ", "--ratios") == value / 100


@pytest.mark.parametrize("text", ["-1", "-0.1", "101", "nan", "inf", "1e400", "200%", "", "half", "0x10", "50%%x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ratios"):
        parse_share(text, "--ratios")


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_ratios_come_out_ascending_and_distinct(values: list[float]) -> None:
    assert parse_ratios(",".join(map(repr, values))) == tuple(sorted(set(values)))


def test_percent_and_shares_mix_entry_by_entry() -> None:
    assert parse_ratios("100,0.25,50,0,25") == (0.0, 0.25, 0.5, 1.0)
    assert parse_ratios("1%,1") == (0.01, 1.0)


def test_band() -> None:
    assert parse_band("50..100") == (0.5, 1.0)
    assert parse_band("0.25..0.25") == (0.25, 0.25)
    for bad in ("50", "50-100", "100..50", "50..", "..", "0..101"):
        with pytest.raises(ConfigError, match="--band"):
            parse_band(bad)


def test_sizes_and_numbers() -> None:
    assert parse_size("32") == (32, 32)
    assert parse_size("224x320") == (224, 320)
    for bad in ("0", "-3", "3x", "x", "1x2x3", "3.5", "99999", "²"):
        with pytest.raises(ConfigError, match="--resize"):
            parse_size(bad)
    assert parse_numbers("0.5, 0.25,1e-1", "--mean") == (0.5, 0.25, 0.1)
    for bad in ("", "a", "1,,2", "nan,1", "inf"):
        with pytest.raises(ConfigError, match="--mean"):
            parse_numbers(bad, "--mean")


@given(st.text(max_size=40))
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    shown = safe(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    if text.isprintable():
        assert shown == text


def test_json_has_no_nan() -> None:
    assert plain({"a": (math.nan, 1.5, math.inf), 3: True}) == {"a": [None, 1.5, None], "3": True}


def test_words() -> None:
    assert percent(0.87654) == "87.65 %" and percent(None) == "-"
    assert size_name(1023) == "1023 bytes" and size_name(1536) == "1.5 KiB" and size_name(3 << 30) == "3.00 GiB"
    assert duration(12.34) == "12.3 s" and duration(119.9) == "2 min 0 s"
