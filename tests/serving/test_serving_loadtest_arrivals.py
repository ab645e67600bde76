"""Arrival processes and traces of the load test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError, DataError
from bitdial.loadtest import arrivals
from bitdial.loadtest.arrivals import fit_trace, poisson, rates, repeat, scale_rate, steps, uniform, window
from bitdial.loadtest.trace import read_trace

gaps = st.lists(st.floats(0.0, 5.0, allow_subnormal=False), min_size=1, max_size=200)


def ascending(times: np.ndarray) -> bool:
    return times.dtype == np.float64 and bool((np.diff(times) >= 0).all()) and bool((times >= 0).all())


@given(st.floats(0.1, 500), st.floats(0.1, 20), st.integers(0, 1000))
def test_poisson_and_uniform_are_ascending_within_the_span_and_seeded(rate: float, seconds: float, seed: int) -> None:
    times = poisson(rate, seconds, seed)
    assert ascending(times) and (times < seconds).all()
    assert np.array_equal(times, poisson(rate, seconds, seed))
    even = uniform(rate, seconds)
    assert ascending(even) and even[0] == 0.0 and (even < seconds).all()
    assert abs(len(even) - rate * seconds) <= 1 and np.allclose(np.diff(even), 1 / rate)


def test_poisson_has_its_rate_and_its_spread() -> None:
    times = poisson(200.0, 500.0, 3)
    counts = np.histogram(times, np.arange(501))[0]
    # 100,000 arrivals: the mean is within 5 standard errors; variance equals mean, standard error of their quotient 6 %.
    assert abs(counts.mean() - 200) < 5 * np.sqrt(200 / 500)
    assert 0.7 < counts.var() / counts.mean() < 1.35
    assert not np.array_equal(poisson(50, 1, 0), poisson(50, 1, 1))


def test_steps_change_the_rate_at_once() -> None:
    times = steps("100:10s,1000:2s,0:3s,100:5", seed=1)
    assert ascending(times)
    counts = [np.count_nonzero((times >= a) & (times < b)) for a, b in ((0, 10), (10, 12), (12, 15), (15, 20))]
    assert counts[2] == 0
    for count, expected in zip(counts, (1000, 2000, 0, 500), strict=True):
        assert abs(count - expected) <= 5 * np.sqrt(expected)
    assert np.array_equal(times, steps(((100, 10), (1000, 2), (0, 3), (100, 5)), seed=1))


@pytest.mark.parametrize(
    "text", ["", "20", "20:", "x:10s", "20:10s,", "-1:5", "nan:5", "inf:1", "0:5", "20:0s", "20:-3", "1:1x"]
)
def test_bad_steps(text: str) -> None:
    with pytest.raises(ConfigError):
        steps(text)


def test_durations() -> None:
    assert [arrivals.parse_duration(t) for t in ("90", "1.5m", "250ms", "1h", " 2 s ", ".5")] == [
        90,
        90,
        0.25,
        3600,
        2,
        0.5,
    ]
    for text in ("", "s", "-1", "0", "1d", "nan", "1e999"):
        with pytest.raises(ConfigError):
            arrivals.parse_duration(text)


@pytest.mark.parametrize("call", [lambda: poisson(1e9, 1e9), lambda: uniform(0, 1), lambda: poisson(float("nan"), 1),
                                  lambda: poisson(1, -1), lambda: scale_rate(np.empty(0), 1, 1), lambda: uniform(1e8, 10),
                                  lambda: repeat(np.zeros(1), 1e-9, 1.0), lambda: window(np.zeros(1), 1, 1)])  # fmt: skip
def test_impossible_arrivals_are_refused_before_memory_is_taken(call: object) -> None:
    with pytest.raises(ConfigError):
        call()  # type: ignore[operator]


@given(gaps, st.floats(0.1, 8.0), st.integers(0, 99))
def test_keeping_peaks_scales_every_stretch_alike(found: list[float], factor: float, seed: int) -> None:
    times = np.cumsum(found)
    seconds = float(times[-1]) + 1.0
    rate = factor * len(times) / seconds
    scaled = scale_rate(times, seconds, rate, seed, keep_peaks=True)
    assert ascending(scaled) and scaled[-1] <= seconds
    assert np.array_equal(scaled, scale_rate(times, seconds, rate, seed, keep_peaks=True))
    assert len(scaled) == 1 or abs(len(scaled) - factor * len(times)) <= 0.5 + 1e-9  # halves go either way
    real = len(scaled) / len(times)
    # At every arrival the number so far is the old one times the factor, to within 1. (Equal times: of the first of them
    # downwards, of any upwards. The search allows for the last bits that interpolation may lose.)
    low = np.searchsorted(scaled, times - 1e-9 * seconds, side="left")
    high = np.searchsorted(scaled, times + 1e-9 * seconds, side="right")
    assert (low <= np.searchsorted(times, times) * real + 1 + 1e-6).all()
    assert (high >= np.arange(len(times)) * real - 1 - 1e-6).all()


@given(gaps, st.floats(0.1, 8.0), st.integers(0, 99))
def test_scaling_by_chance_stays_within_the_gaps(found: list[float], factor: float, seed: int) -> None:
    times = np.cumsum(found)
    seconds = float(times[-1]) + 1.0
    scaled = scale_rate(times, seconds, factor * len(times) / seconds, seed)
    assert ascending(scaled) and (len(scaled) == 0 or times[0] <= scaled[0] and scaled[-1] <= seconds)
    each = np.diff(np.searchsorted(scaled, times[np.append(True, np.diff(times) > 1e-9)]))
    if factor < 1:
        assert set(scaled) <= set(times)
    elif (np.diff(times) > 1e-9).all() and len(times) > 1:
        assert each.min() >= int(factor) and each.max() <= int(factor) + 1


def test_scaling_a_long_trace_gives_the_rate_and_keeps_its_shape() -> None:
    times = steps("50:100s,200:100s", seed=2)
    for keep in (False, True):
        for rate in (10.0, 300.0):
            scaled = scale_rate(times, 200.0, rate, 1, keep)
            assert len(scaled) / 200 == pytest.approx(rate, rel=0.08)
            low, high = rates(scaled, 200.0, 100.0)
            assert high / low == pytest.approx(4.0, rel=0.2)


@given(gaps, st.floats(0.01, 3.0), st.integers(1, 5))
def test_repeating_copies_every_period(found: list[float], rest: float, rounds: int) -> None:
    times = np.cumsum(found)
    period = float(times[-1]) + rest
    laid = repeat(times, period, rounds * period * (1 - 1e-12))
    assert ascending(laid) and len(laid) == rounds * len(times)
    assert np.allclose(laid.reshape(rounds, -1) - period * np.arange(rounds)[:, None], times)


def test_fitting_a_trace_in_every_way() -> None:
    times = np.arange(0.0, 100.0, 0.5)  # 2 requests/s
    plain = fit_trace(times)
    assert plain.seconds == pytest.approx(100.0) and plain.rate == pytest.approx(2.0) and len(plain.times) == 200
    cut = fit_trace(times, begin=10, end=30, speed=2.0)
    assert (
        cut.seconds == 10.0
        and len(cut.times) == 40
        and cut.times[0] == 0.0
        and "10 to 30 s, 2 times as fast" in cut.text
    )
    short = fit_trace(times, duration=5, rate=20, keep_peaks=True)
    assert short.seconds == 5 and len(short.times) == 100 and short.rate == pytest.approx(20.0)
    assert fit_trace(times, duration=1000).seconds == pytest.approx(100.0)  # a trace is not stretched
    again = fit_trace(times, duration=250, again=True)
    assert again.seconds == 250 and len(again.times) == pytest.approx(500, abs=2) and again.times[-1] > 249
    for wrong in ({"begin": 200.0}, {"begin": 5.0, "end": 4.0}, {"speed": 0.0}, {"rate": -1.0}, {"duration": 0.0}):
        with pytest.raises(ConfigError):
            fit_trace(times, **wrong)  # type: ignore[arg-type]


def test_traces_of_epoch_times_are_refused_with_a_hint_and_play_after_it() -> None:
    times = 1_769_904_000.25 + np.arange(50) / 10.0
    with pytest.raises(ConfigError, match=r"Unix time \(2026-02-01 00:00:00 UTC\).*--from 1769904000"):
        fit_trace(times)
    with pytest.raises(ConfigError, match="in the first 60 s of the trace; begin .* --from 1000"):
        fit_trace(times - times[0] + 1e3, duration=60.0)
    with pytest.raises(ConfigError, match="Unix time in milliseconds; make seconds"):
        fit_trace(times * 1e3)
    with pytest.raises(ConfigError, match=r"2e\+06 s after the beginning; begin .* --from 2000000"):
        fit_trace(times - times[0] + 2e6)
    played = fit_trace(times, begin=1_769_904_000.0)
    assert played.times[0] == pytest.approx(0.25) and 5.1 < played.seconds < 5.4  # no silence of 54 years at the end
    assert len(fit_trace(times - times[0] + 1e5).times) == 50  # a day is waited for


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.booleans(), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=40)
def test_traces_are_read_back_sorted(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], csv: bool, end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "trace.csv"
    lines = ["kind, arrival_s ,size", *(f'"a",{v!r},1' for v in values)] if csv else [repr(v) for v in values]
    path.write_bytes(("# a remark" + end + end.join(lines) + end + end).encode())
    times = read_trace(path)
    assert ascending(times) and np.array_equal(times, np.sort(np.asarray(values) + 0.0))


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "empty"),
        (b"\n# only remarks\n", "empty"),
        (b"arrival_s\n", "no arrival"),
        (b"time,size\n1,2\n", "no column arrival_s"),
        (b"1,2\n3,4\n", "several columns"),
        (b"arrival_s\n1\nnan\n", "arrival 2 is nan"),
        (b"arrival_s\n-1\n", "arrival 1 is -1"),
        (b"1\ninf\n", "inf"),
        (b"arrival_s\n1\nx\n", "no arrival time"),
        (b"a,arrival_s\n1,2\n3\n", "no arrival time"),
        (b"\xff\xfe\x00\x01", "no text"),
        (b"\x00\x00", "no column"),
    ],
)  # fmt: skip
def test_bad_traces_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="bad.csv") as caught:
        read_trace(path)
    assert told in str(caught.value)


def test_missing_folder_and_huge_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError):
            read_trace(path)
    long = tmp_path / "long.csv"
    long.write_text("1\n2\n3\n")
    monkeypatch.setattr("bitdial.loadtest.trace.MOST_ARRIVALS", 2)
    with pytest.raises(DataError, match="3 arrivals"):
        read_trace(long)
    monkeypatch.setattr("bitdial.loadtest.trace.MOST_BYTES", 3)
    with pytest.raises(DataError, match="MB"):
        read_trace(long)


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_no_content_gets_past_as_anything_but_times_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    try:
        times = read_trace(path)
    except DataError:
        return
    assert ascending(times) and np.isfinite(times).all() and len(times)


@pytest.mark.needs_data
def test_real_traces(data_folder: Path) -> None:
    for name, count in (("code", 8819), ("conv", 19366)):
        times = read_trace(data_folder / "traces" / f"azure_llm_2023_{name}.csv")
        assert len(times) == count and ascending(times)
        schedule = fit_trace(times, speed=60.0, duration=30.0, rate=100.0, keep_peaks=True, seed=1)
        assert schedule.seconds == 30.0 and schedule.rate == pytest.approx(100.0, rel=1e-3)
