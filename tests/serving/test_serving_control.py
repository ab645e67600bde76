"""The controller: queue, table, policies, scheduler, recording. All under a virtual clock."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import random
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from bitdial.errors import ConfigError
from bitdial.serving.control import (
    Batch,
    CorrectedTable,
    Recorder,
    Request,
    RequestQueue,
    Scheduler,
    ServiceTable,
    Settings,
    make_policy,
    replay,
)
from bitdial.serving.control.planned import make_plan
from bitdial.serving.control.rate import ArrivalRate
from bitdial.serving.control.table import useful_ratios

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def table(
    seconds: tuple[float, ...] = (0.010, 0.009, 0.008, 0.0065, 0.005),
    accuracy: tuple[float | None, ...] = (0.90, 0.899, 0.897, 0.892, 0.88),
    gain: float = 1.0,
) -> ServiceTable:
    """Seconds of one image; a batch of n takes n ** gain times as long."""
    batches = (1, 2, 4, 8)
    rows = tuple(tuple(s * n**gain for n in batches) for s in seconds)
    return ServiceTable(RATIOS, batches, rows, accuracy)


def scheduler(policy: str = "planned", workers: int = 1, observer: Any = None, **changes: Any) -> Scheduler:
    base: dict[str, Any] = {"slo": 0.1, "max_batch": 4}
    return Scheduler(table(), Settings(**{**base, **changes}), make_policy(policy), workers, observer)


def request(
    id: int, now: float, samples: int = 1, slo: float = 0.1, cap: int = 4, timeout: float | None = None
) -> Request:
    return Request(id, now, now + slo, now + (slo if timeout is None else timeout), samples, cap)


# ---- table -----------------------------------------------------------------------------------------------------------------


def test_latency_is_linear_between_sizes_and_proportional_beyond() -> None:
    measured = ServiceTable((0.0, 1.0), (1, 4), ((0.010, 0.028), (0.008, 0.020)), (None, None))
    assert measured.latency(0, 1) == 0.010
    assert measured.latency(0, 2) == pytest.approx(0.016)
    assert measured.latency(0, 4) == pytest.approx(0.028)
    assert measured.latency(0, 8) == pytest.approx(0.056)


def test_table_survives_json_and_refuses_damage() -> None:
    whole = table()
    text = json.dumps(whole.as_json())
    assert ServiceTable.from_json(text) == whole
    for key, value in {
        "ratios": [0.5, 0.25],
        "batches": [2, 4],
        "seconds": [[1.0]],
        "accuracy": [2.0] * 5,
        "format": "other",
        "version": 2,
    }.items():
        with pytest.raises(ConfigError):
            ServiceTable.from_json({**whole.as_json(), key: value})
    for broken in ("", "[]", "{", '{"format": "bitdial-service-table", "version": 1}', "[" * 100_000):
        with pytest.raises(ConfigError):
            ServiceTable.from_json(broken)
    with pytest.raises(ConfigError):
        ServiceTable.from_json({**whole.as_json(), "seconds": [[float("nan")] * 4] * 5})


def test_hull_leaves_out_bad_buys() -> None:
    # 25 %: no faster; 50 %: a mixture of its neighbours is as fast and loses less.
    bad = table(seconds=(0.010, 0.0101, 0.0078, 0.0065, 0.005), accuracy=(0.90, 0.899, 0.8955, 0.895, 0.88))
    assert useful_ratios(bad, 1, range(5)) == [0, 3, 4]
    # Linear in both: all are on the hull, mixing gains nothing.
    even = table(seconds=(0.010, 0.009, 0.008, 0.007, 0.006), accuracy=(0.90, 0.89, 0.88, 0.87, 0.86))
    assert useful_ratios(even, 1, range(5)) == [0, 1, 2, 3, 4]
    # Accuracies that nobody measured: the ratio stands in for what is lost.
    unknown = table(accuracy=(None,) * 5)
    assert useful_ratios(unknown, 1, range(5))[0] == 0 and useful_ratios(unknown, 1, range(5))[-1] == 4
    # A free gain: the smaller ratio is never used.
    free = table(accuracy=(0.9,) * 5)
    assert useful_ratios(free, 1, range(5))[-1] == 4


@given(
    st.lists(st.floats(0.001, 0.02), min_size=5, max_size=5),
    st.lists(st.floats(0.5, 1.0), min_size=5, max_size=5),
)
def test_hull_is_convex_and_keeps_the_fastest(seconds: list[float], accuracy: list[float]) -> None:
    any_table = table(seconds=tuple(seconds), accuracy=tuple(accuracy))
    kept = useful_ratios(any_table, 1, range(5))
    times = [any_table.latency(i, 1) for i in kept]
    losses = [any_table.loss(i) for i in kept]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)
    assert times[-1] == min(any_table.latency(i, 1) for i in range(5))
    slopes = [(l1 - l0) / (s0 - s1) for (s0, l0), (s1, l1) in itertools.pairwise(zip(times, losses, strict=True))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(slopes))


def test_table_follows_a_slower_machine() -> None:
    corrected = CorrectedTable(table())
    for _ in range(200):
        corrected.observe(0, 1, 0.015)
    assert corrected.latency(0, 1) == pytest.approx(0.015, rel=0.02)
    assert corrected.latency(4, 1) > 0.005 * 1.2  # what is common to all ratios is believed of those that did not run
    for nonsense in (0.0, -1.0, math.inf, math.nan):
        corrected.observe(0, 1, nonsense)
    assert corrected.latency(0, 1) == pytest.approx(0.015, rel=0.02)


# ---- arrivals ----------------------------------------------------------------------------------------------------------------


def test_rate_converges_and_forgets() -> None:
    rate = ArrivalRate(1.0, 10.0)
    assert rate.fast(0.0) == rate.slow(0.0) == 0.0
    now = 0.0
    for _ in range(3000):
        now += 0.01
        rate.arrived(now, 2)
    assert rate.fast(now) == pytest.approx(200, rel=0.03)
    assert rate.slow(now) == pytest.approx(200, rel=0.1)
    assert rate.request_size == pytest.approx(2, rel=0.01)
    assert rate.fast(now + 10) < 1 < rate.slow(now + 10)
    before = rate.fast(now + 10)
    assert rate.fast(now - 1000) == pytest.approx(before)  # time that runs backwards is no time


# ---- queue -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), max_size=40), st.randoms(use_true_random=False))
def test_queue_orders_by_deadline_and_counts_samples(items: list[tuple[float, int]], chance: random.Random) -> None:
    queue = RequestQueue()
    for id, (deadline, samples) in enumerate(items):
        queue.add(Request(id, 0.0, deadline, deadline, samples, 4))
    assert [(r.deadline, r.id) for r in queue] == sorted((d, i) for i, (d, _) in enumerate(items))
    assert queue.samples == sum(n for _, n in items)
    taken: list[int] = []
    while len(queue):
        positions = sorted(chance.sample(range(len(queue)), chance.randint(1, len(queue))))
        expected = [queue[p].id for p in positions]
        got = [r.id for r in queue.take(positions)]
        assert got == expected
        taken += got
        if len(queue) and chance.random() < 0.5:
            gone = queue[chance.randrange(len(queue))].id
            assert queue.remove(gone) and not queue.remove(gone)
            taken.append(gone)
    assert sorted(taken) == list(range(len(items))) and queue.samples == 0 and queue.oldest_arrival() is None


# ---- scheduler ---------------------------------------------------------------------------------------------------------------


def drive(
    target: Scheduler,
    arrivals: list[tuple[float, int]],
    factor: float = 1.0,
    slo: float = 0.1,
    timeout: float | None = None,
    caps: dict[int, int] | None = None,
) -> dict[str, Any]:
    """Run arrivals (time, samples) through a scheduler with exact service times (scaled) on `workers` workers."""
    events: list[tuple[float, int, str, Any]] = []
    order = itertools.count()
    for id, (when, samples) in enumerate(arrivals):
        events.append((when, next(order), "in", (id, samples)))
    events.sort()
    done: dict[int, tuple[float, int]] = {}
    refused: list[int] = []
    expired: list[int] = []
    batches: list[Batch] = []
    free = target.workers
    import heapq

    heapq.heapify(events)
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "in":
            cap = (caps or {}).get(what[0], 4)
            if target.submit(now, request(what[0], now, what[1], slo, cap, timeout)) is not None:
                refused.append(what[0])
        elif kind == "out":
            free += 1
            target.completed(now, what, now - what.begun)
            for r in what.requests:
                done[r.id] = (now - r.arrival, what.index)
        while free and (batch := target.next_batch(now)) is not None:
            free -= 1
            batches.append(batch)
            seconds = table().latency(batch.index, batch.samples) * factor
            heapq.heappush(events, (now + seconds, next(order), "out", batch))
        expired += [r.id for r in target.take_expired()]
        wake = target.wake_at()
        if free and wake is not None and not any(e[2] == "wake" and e[0] <= wake for e in events):
            heapq.heappush(events, (max(wake, now + 1e-6), next(order), "wake", None))
    return {"done": done, "refused": refused, "expired": expired, "batches": batches}


def poisson(rate: float, seconds: float, seed: int = 0, samples: int = 1) -> list[tuple[float, int]]:
    chance = random.Random(seed)
    times: list[tuple[float, int]] = []
    now = 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        times.append((now, samples))
    return times


@settings(max_examples=60)
@given(
    policy=st.sampled_from(["planned", "planned:late=5", "lookahead", "slackfit", "ladder", "fixed:0", "fixed:1"]),
    rate=st.floats(5, 600),
    workers=st.integers(1, 3),
    timeout=st.sampled_from([None, 0.05, 1.0]),
    max_wait=st.sampled_from([0.0, 0.01]),
    max_queue=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_every_request_ends_exactly_once(
    policy: str, rate: float, workers: int, timeout: float | None, max_wait: float, max_queue: int, seed: int
) -> None:
    target = scheduler(policy, workers, max_wait=max_wait, max_queue=max_queue)
    chance = random.Random(seed)
    arrivals = [(t, chance.randint(1, 6)) for t, _ in poisson(rate, 1.0, seed)]
    caps = {i: chance.randint(0, 4) for i in range(len(arrivals))}
    out = drive(target, arrivals, timeout=timeout, caps=caps)
    ends = [*out["done"], *out["refused"], *out["expired"]]
    assert sorted(ends) == list(range(len(arrivals)))
    assert len(target.queue) == 0 and not target.running
    for batch in out["batches"]:
        assert batch.index <= min(r.cap for r in batch.requests)
        assert batch.samples == sum(r.samples for r in batch.requests)
        assert batch.samples <= 4 or len(batch.requests) == 1
        drop = 0.1 if timeout is None else timeout
        assert all(batch.begun <= r.arrival + drop for r in batch.requests)


def test_low_load_keeps_full_precision_and_a_burst_turns_the_dial() -> None:
    calm = drive(scheduler(), poisson(30, 20))
    assert {index for _, index in calm["done"].values()} == {0}
    assert not calm["refused"] and not calm["expired"]
    burst = drive(scheduler(), poisson(150, 20))  # half as much again as 8 bits can carry
    assert not burst["expired"] and len(burst["refused"]) <= 0.01 * len(burst["done"])
    late = [t for t, _ in burst["done"].values() if t > 0.1]
    assert len(late) <= 0.01 * len(burst["done"])
    mean = sum(RATIOS[i] for _, i in burst["done"].values()) / len(burst["done"])
    assert 0.3 < mean < 0.95
    fixed = drive(scheduler("fixed:0"), poisson(150, 20))
    assert len(fixed["refused"]) + len(fixed["expired"]) > 0.2 * len(poisson(150, 20))


def test_precision_returns_at_once_when_the_burst_is_over() -> None:
    target = scheduler()
    arrivals = poisson(40, 5) + [(5 + t, n) for t, n in poisson(170, 3, 1)] + [(8 + t, n) for t, n in poisson(40, 5, 2)]
    out = drive(target, arrivals)
    by_time = [(arrivals[id][0], index) for id, (_, index) in sorted(out["done"].items())]
    assert max(i for t, i in by_time if 5.5 < t < 8) >= 3
    assert {i for t, i in by_time if t > 9} == {0}


@pytest.mark.parametrize("policy", ["planned", "lookahead", "slackfit", "ladder"])
def test_the_dial_comes_down_after_an_overload_that_nobody_could_carry(policy: str) -> None:
    target = scheduler(policy)
    arrivals = poisson(2000, 2) + [(2 + t, n) for t, n in poisson(20, 10, 1)]
    out = drive(target, arrivals)
    back = [arrivals[id][0] for id, (_, index) in out["done"].items() if index == 0 and arrivals[id][0] > 2]
    assert back and min(back) < 5.0  # with a few requests a second, and a dwell of one second for some
    late = [index for id, (_, index) in out["done"].items() if arrivals[id][0] > 7]
    assert sum(index > 0 for index in late) <= 0.05 * len(late)


# ---- the plan ----------------------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("rate", "late", "room"),
    [(60, 1.0, 0.05), pytest.param(120, 1.0, 0.05, marks=SLOW), (120, 10.0, 0.05), pytest.param(150, 2.0, 0.1, marks=SLOW)],
)
def test_plan_is_the_best_threshold_policy(rate: float, late: float, room: float) -> None:
    """Against every policy of two thresholds, simulated: none has a lower cost per request beyond the noise."""
    seconds, losses = (0.010, 0.008, 0.005), (0.0, 0.05, 0.3)

    def cost(choice: list[int]) -> float:
        chance = np.random.default_rng(5)
        waiting, total, requests = 1, 0.0, 0
        for _ in range(20000):
            r = choice[min(waiting, len(choice)) - 1]
            fits = max(0, math.floor((room - seconds[r]) / seconds[-1] + 1e-9))
            came = int(chance.poisson(rate * seconds[r]))
            behind = waiting - 1 + came
            total += losses[r] + late * max(0, behind - fits)
            requests += came
            waiting = min(behind, fits)
            if waiting == 0:
                waiting, requests = 1, requests + 1
        return total / requests

    plan = make_plan(seconds, losses, rate, 1, room, late)
    assert list(plan.candidate) == sorted(plan.candidate)  # a longer queue never lowers the dial
    states = len(plan.candidate)
    best = min(
        cost([0] * a + [1] * (b - a) + [2] * (states - b)) for a in range(states + 1) for b in range(a, states + 1)
    )
    assert cost(list(plan.candidate)) <= 1.05 * best + 1e-4


def test_plan_follows_load_and_what_is_lost() -> None:
    seconds = (0.010, 0.005)
    calm = make_plan(seconds, (0.0, 0.02), 20, 1, 0.08, 1.0)
    busy = make_plan(seconds, (0.0, 0.02), 150, 1, 0.08, 1.0)
    dear = make_plan(seconds, (0.0, 0.5), 150, 1, 0.08, 1.0)
    assert busy.candidate.count(1) > calm.candidate.count(1) and busy.candidate.count(1) > dear.candidate.count(1)
    assert make_plan(seconds, (0.0, 0.02), 150, 1, 0.08, 100.0).candidate.count(1) >= busy.candidate.count(1)
    assert set(make_plan(seconds, (0.0, 0.0), 150, 1, 0.08, 1.0).candidate[1:]) == {1}  # what costs nothing is taken


def test_caps_are_respected_and_differing_caps_are_batched_apart() -> None:
    target = scheduler("fixed:1")
    for id, cap in enumerate([4, 1, 4, 0]):
        assert target.submit(0.0, request(id, 0.0, 1, cap=cap)) is None
    batches = []
    while (batch := target.next_batch(0.0)) is not None:
        batches.append(([r.id for r in batch.requests], batch.index))
        target.completed(0.0, batch, batch.expected)
    assert batches == [([0, 2], 4), ([1], 1), ([3], 0)] or batches == [([0], 4), ([1], 1), ([2], 4), ([3], 0)]
    assert target.cap(0.6) == 2 and target.cap(None) == 4 and target.cap(0.0) == 0


def test_dial_limits_of_the_server() -> None:
    assert Settings(max_ratio=0.6).allowed(table()) == [0, 1, 2]
    assert Settings(min_accuracy=0.895).allowed(table()) == [0, 1, 2]
    for wrong, message in (
        ({"min_accuracy": 0.99}, "above what any ratio"),
        ({"slo": 0.0}, "slo"),
        ({"slo": math.nan}, "slo"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_ratio": 1.5}, "max_ratio"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings(**wrong).allowed(table())
    with pytest.raises(ConfigError, match="needs a measured accuracy"):
        Settings(min_accuracy=0.5).allowed(table(accuracy=(None,) * 5))
    banded = ServiceTable((0.5, 1.0), (1,), ((0.01,), (0.008,)), (None, None))
    with pytest.raises(ConfigError, match="below the model's smallest"):
        Settings(max_ratio=0.2).allowed(banded)


def test_back_pressure() -> None:
    full = scheduler(max_queue=3, refuse_late=False)
    assert [full.submit(0.0, request(i, 0.0)) for i in range(3)] == [None] * 3
    refusal = full.submit(0.0, request(3, 0.0))
    assert refusal is not None and refusal.reason == "queue full" and refusal.retry_after > 0
    # 100 ms hold 20 samples at the top ratio; the rest could not be in time.
    bounded = scheduler()
    answers = [bounded.submit(0.0, request(i, 0.0)) for i in range(40)]
    taken = sum(a is None for a in answers)
    assert 15 <= taken <= 20
    assert all(a is not None and a.reason == "overloaded" and a.retry_after > 0 for a in answers[taken:])


def test_a_fixed_ratio_is_judged_by_what_it_can_do() -> None:
    """Without this a server at 8 bits would begin what only the top ratio could finish in time, and be late with it."""
    for policy in ("fixed:0", "fixed:1", "planned"):
        out = drive(scheduler(policy), poisson(260, 10))
        late = sum(t > 0.1 + 1e-9 for t, _ in out["done"].values())
        assert late <= 0.002 * len(out["done"]), policy
    capped = scheduler("fixed:1")
    assert capped.submit(0.0, request(0, 0.0, cap=1)) is None
    batch = capped.next_batch(0.0)
    assert batch is not None and batch.index == 1  # a caller's limit holds all the same


def test_expired_requests_cost_nothing() -> None:
    target = scheduler(refuse_late=False)
    for id in range(3):
        target.submit(0.0, request(id, 0.0))
    assert target.next_batch(0.2) is None
    assert [r.id for r in target.take_expired()] == [0, 1, 2] and target.take_expired() == []
    target.submit(1.0, request(7, 1.0, timeout=10.0))  # late answers are still of use: it is served
    batch = target.next_batch(2.0)
    assert batch is not None and [r.id for r in batch.late] == [7]


def test_a_batch_waits_for_more_only_as_long_as_it_may() -> None:
    many = ServiceTable(RATIOS, (1, 4), ((0.010, 0.012),) * 5, (None,) * 5)
    target = Scheduler(many, Settings(slo=0.1, max_batch=4, max_wait=0.02), make_policy("fixed:0"))
    target.submit(0.0, request(0, 0.0))
    assert target.next_batch(0.0) is None and target.wake_at() == pytest.approx(0.02)
    assert target.next_batch(0.02) is not None
    for id in range(1, 5):
        target.submit(0.03, request(id, 0.03))
    batch = target.next_batch(0.03)
    assert batch is not None and batch.samples == 4
    late = Scheduler(many, Settings(slo=0.1, max_batch=4, max_wait=5.0), make_policy("fixed:0"))
    late.submit(0.0, request(0, 0.0))
    wake = late.wake_at()
    assert wake is not None and 0.08 < wake < 0.09  # the deadline goes before max_wait


def test_batches_do_not_grow_where_that_buys_nothing() -> None:
    assert Scheduler(table(), Settings(max_batch=8), make_policy("fixed:0")).full_batch == 1
    assert Scheduler(table(gain=0.7), Settings(max_batch=8), make_policy("fixed:0")).full_batch == 8


def test_lost_batches_and_gone_senders() -> None:
    target = scheduler()
    for id in range(3):
        target.submit(0.0, request(id, 0.0))
    batch = target.next_batch(0.0)
    assert batch is not None
    target.failed(0.01, batch)
    assert not target.running
    left = [r.id for r in target.queue]
    assert target.cancel(0.01, left[0]) and not target.cancel(0.01, left[0])


def test_clock_jumps_do_no_harm() -> None:
    target = scheduler(refuse_late=False)
    for id, now in enumerate([100.0, 50.0, 1e9, 3.0, 1e9 + 1]):
        target.submit(now, request(id, now))
        batch = target.next_batch(now)
        if batch is not None:
            target.completed(now - 5.0, batch, -5.0)
        target.take_expired()
        assert target.oldest_wait(now - 10.0) >= 0.0
    assert 0.2 < target.table.latency(0, 1) / 0.010 < 5


@pytest.mark.parametrize(
    "policy", ["lookahead", "lookahead:risk=3,dwell=0.5", "slackfit", "ladder:step=2", "fixed:0.5"]
)
def test_recording_replays_to_the_same_decisions(policy: str) -> None:
    stream = io.StringIO()
    chosen = Settings(slo=0.1, max_batch=4)
    recorder = Recorder(stream, table(), chosen, policy, 2)
    target = Scheduler(table(), chosen, make_policy(policy), 2, recorder)
    drive(target, [(t, 1 + i % 3) for i, (t, _) in enumerate(poisson(180, 3))], factor=1.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 500 and replay(lines) == []
    assert replay([line.replace('"samples"', '"images"') for line in lines]) == []  # as older recordings call them
    changed = [line.replace('"index": 0', '"index": 4') for line in lines]
    if changed != lines:
        assert replay(changed)
    for damaged in ([], ["{}"], lines[1:], [lines[0], '{"event": "done", "now": 1, "batch": 9, "seconds": 1}', "x"]):
        with pytest.raises(ConfigError):
            replay(damaged)


def test_recorder_outlives_a_full_disk() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    recorder = Recorder(Full(), table(), Settings(), "fixed:0", 1)
    recorder("submit", 0.0, id=1)
    assert "no space" in recorder.error


def test_policies_by_name() -> None:
    assert make_policy("fixed:0.5").name == "fixed:0.5"
    for wrong in (
        "best",
        "fixed:2",
        "fixed:x",
        "lookahead:risk=-1",
        "lookahead:speed=1", "planned:late=0",
        "slackfit:dwell=nan",
        "ladder:step=0",
    ):
        with pytest.raises(ConfigError, match=r"policy|fixed|risk|step|late"):
            make_policy(wrong)


# ---- curves that rise, and rest ------------------------------------------------------------------------------------------------

RISING = (0.9889, 0.9889, 0.9889, 0.9889, 0.9917)  # the last by noise


def test_a_rise_of_accuracy_is_noise_to_every_decision() -> None:
    rising = table(accuracy=RISING)
    assert rising.accuracy == RISING and rising.expected == (0.9889,) * 5
    assert Settings(min_accuracy=0.9889).allowed(rising) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="above what any ratio"):
        Settings(min_accuracy=0.99).allowed(rising)  # not the last ratio alone
    dip = table(accuracy=(0.90, 0.90, 0.88, 0.90, 0.90))
    assert Settings(min_accuracy=0.89).allowed(dip) == [0, 1]
    assert [rising.loss(i) for i in range(5)] == sorted(rising.loss(i) for i in range(5))
    # Between ratios of equal accuracy agreement with the 8-bit model decides.
    told = dataclasses.replace(rising, agreement=(1.0, 1.0, 0.999, 0.999, 0.95), samples=360)
    early = dataclasses.replace(rising, agreement=(1.0, 0.95, 0.95, 0.95, 0.95), samples=360)
    assert useful_ratios(told, 1, range(5)) == [0, 1, 3, 4] and useful_ratios(early, 1, range(5)) == [0, 4]
    assert told.loss(3) == pytest.approx(math.sqrt(0.001 / 360) + 0.00075)
    assert ServiceTable.from_json(json.dumps(told.as_json())) == told
    for key, value in {"agreement": [2.0] * 5, "samples": 0, "ceiling": 1.5}.items():
        with pytest.raises(ConfigError):
            ServiceTable.from_json({**told.as_json(), key: value})


@pytest.mark.parametrize("policy", ["planned", "lookahead", "slackfit", "ladder"])
def test_an_idle_server_is_back_at_the_lowest_ratio(policy: str) -> None:
    """With a curve that seems to cost nothing and little room for a second request, a plan alone stays at the top for good."""
    flat = ServiceTable((0.0, 0.5, 1.0), (1,), ((0.010,), (0.008,), (0.006,)), (0.9889, 0.9889, 0.9917))
    target = Scheduler(flat, Settings(slo=0.0155), make_policy(policy))
    for id in range(40):  # a burst
        now = 0.004 * id
        target.submit(now, request(id, now, slo=0.0155, cap=2))
        if (batch := target.next_batch(now)) is not None:
            target.completed(now + 0.0035, batch, 0.0035)
    assert target.dial(now + 1.0) == 0
    for id in range(5):  # each comes after a second of nothing
        now = 1.0 + id
        assert target.submit(now, request(100 + id, now, slo=0.0155, cap=2)) is None
        batch = target.next_batch(now)
        assert batch is not None and batch.index == 0 == target.current
        target.completed(now + 0.01, batch, 0.01)
    fixed = Scheduler(flat, Settings(slo=0.0155), make_policy("fixed:1"))
    fixed.submit(9.0, request(0, 9.0, slo=0.0155, cap=2))
    assert fixed.dial(0.0) == 2 == getattr(fixed.next_batch(9.0), "index", None) and fixed.switches == 0


def test_the_ceiling_of_a_model_bounds_the_dial_unless_told_otherwise() -> None:
    bounded = dataclasses.replace(table(), ceiling=0.5)
    assert Settings().allowed(bounded) == [0, 1, 2] and Settings().bound_by(bounded) == "model file"
    assert Settings(max_ratio=1.0).allowed(bounded) == [0, 1, 2, 3, 4] and Settings(max_ratio=1.0).bound_by(bounded) == ""
    assert Settings(max_ratio=0.25).bound_by(bounded) == "max_ratio" and Settings().bound_by(table()) == ""
    assert Settings(min_accuracy=0.899).bound_by(bounded) == "min_accuracy"
    band = ServiceTable((0.75, 1.0), (1,), ((0.01,), (0.008,)), (None, None), ceiling=0.5)
    assert Settings().allowed(band) == [0]  # something must run
    for policy in ("planned", "lookahead", "slackfit", "ladder", "fixed:1"):
        target = Scheduler(bounded, Settings(slo=0.1, max_batch=4), make_policy(policy))
        out = drive(target, poisson(400, 2))
        assert max(index for _, index in out["done"].values()) == 2
