"""Replicas by arriving work: the rule alone, its signal, and the loop it closes together with the dial, on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.serving.control import Batch, Request, Scheduler, ServiceTable, Settings, make_policy
from bitdial.serving.ray.scaling import METRIC, ScalingSettings, WorkMeter, WorkPolicy, decide, policy_arguments

EIGHT_BIT, FOUR_BIT = 0.020, 0.013  # seconds per image
TABLE = ServiceTable(
    ratios=(0.0, 0.5, 1.0),
    batches=(1, 4),
    seconds=tuple((s, 4 * s) for s in (EIGHT_BIT, 0.5 * (EIGHT_BIT + FOUR_BIT), FOUR_BIT)),
    accuracy=(0.93, 0.92, 0.90),
)
SLO = 0.2


class Arrivals:
    """Feeds `decide` with a constant or changing amount of work, shared out over the replicas."""

    def __init__(self, settings: ScalingSettings, replicas: int = 1, every: float = 1.0) -> None:
        self.settings, self.replicas, self.every = settings, replicas, every
        self.state: dict[str, Any] = {}
        self.now = 0.0
        self.totals: dict[str, float] = {}
        self.history: list[int] = []

    def run(self, seconds: float, work: float) -> int:
        for _ in range(round(seconds / self.every)):
            self.now += self.every
            for i in range(self.replicas):
                self.totals[f"r{i}"] = self.totals.get(f"r{i}", 0.0) + work * self.every / self.replicas
            reported = {f"r{i}": self.totals[f"r{i}"] for i in range(self.replicas)}
            self.replicas, self.state = decide(self.now, reported, self.replicas, self.settings, self.state)
            assert json.loads(json.dumps(self.state)) == self.state
            self.history.append(self.replicas)
        return self.replicas


SETTINGS = ScalingSettings(min_replicas=1, max_replicas=8, utilization=0.7, up_delay=15, down_delay=120, smoothing=10)


def test_steady_work_gives_the_replicas_that_carry_it() -> None:
    for work, wanted in ((0.0, 1), (0.3, 1), (0.9, 2), (2.0, 3), (5.5, 8), (50.0, 8)):
        assert Arrivals(SETTINGS).run(400, work) == wanted


def test_more_replicas_only_after_the_short_delay_and_fewer_only_after_the_long_one() -> None:
    load = Arrivals(SETTINGS)
    load.run(60, 0.3)
    assert load.run(14, 3.0) == 1
    assert load.run(40, 3.0) == 5
    load.history.clear()
    assert load.run(400, 0.3) == 1
    assert load.history.index(1) >= 119
    # a burst shorter than the delay brings none
    short = Arrivals(SETTINGS)
    short.run(60, 0.3)
    short.run(10, 1.2)
    assert short.run(60, 0.3) == 1 and max(short.history) == 1


@pytest.mark.parametrize(("around", "there"), [(2.6, {4}), (2.8, {4, 5})])
def test_work_that_wavers_around_a_limit_does_not_make_replicas_come_and_go(around: float, there: set[int]) -> None:
    load = Arrivals(SETTINGS)
    generator = random.Random(3)
    load.run(100, 2.6)
    load.history.clear()
    for _ in range(120):
        load.run(10, around * generator.uniform(0.9, 1.07))
    assert set(load.history) == there
    assert sum(a != b for a, b in itertools.pairwise(load.history)) == len(there) - 1


def test_fewer_replicas_keeps_what_was_needed_during_the_delay() -> None:
    load = Arrivals(SETTINGS)
    load.run(100, 4.0)
    assert load.replicas == 6
    load.run(60, 0.5)
    load.run(30, 1.6)  # within the delay, and still less than is there
    load.run(70, 0.5)
    assert load.replicas >= 3


def test_replicas_that_come_are_not_counted_twice() -> None:
    """Work moves from one replica to two; the sum of what has arrived must not jump."""
    load = Arrivals(ScalingSettings(1, 8, utilization=0.7, up_delay=5, down_delay=300, smoothing=10))
    load.run(30, 0.6)
    load.run(200, 1.3)
    assert max(load.history) == 2


def test_replicas_that_restart_or_miss_a_report() -> None:
    settings = ScalingSettings(1, 8, up_delay=0, smoothing=10)
    replicas, state = decide(0.0, {"a": 100.0, "b": 100.0}, 2, settings, {})
    assert state["work"] == 0.0  # what had arrived before the first look is not load of now
    replicas, state = decide(1.0, {"b": 100.5}, 2, settings, state)
    replicas, state = decide(2.0, {"a": 101.0, "b": 101.0}, 2, settings, state)
    assert state["work"] == pytest.approx(2.0 / 10, rel=0.1) and replicas == 2
    replicas, state = decide(3.0, {"a": 0.4, "b": 101.5}, 2, settings, state)  # a began again
    assert state["work"] < 0.3 and replicas == 2
    kept = dict(state)
    assert decide(500.0, {}, 2, settings, state)[0] == 2  # nobody reports: nothing changes
    assert decide(500.0, {}, 2, settings, state)[1]["work"] == kept["work"]


@given(
    st.lists(
        st.tuples(
            st.floats(-5, 60),
            st.lists(st.floats(0, 1e6), max_size=4),
            st.integers(0, 12),
        ),
        max_size=30,
    ),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_any_reports_give_a_number_within_the_bounds(steps: list[Any], least: int, more: int) -> None:
    settings = ScalingSettings(least, least + more, up_delay=3, down_delay=20)
    state: dict[str, Any] = {}
    now = 0.0
    for gap, totals, replicas in steps:
        now += gap  # also backwards
        wanted, state = decide(now, {f"r{i}": t for i, t in enumerate(totals)}, replicas, settings, state)
        assert least <= wanted <= least + more


@given(st.floats(0, 100), st.floats(0, 100))
def test_needed_is_monotonic_and_enough(a: float, b: float) -> None:
    settings = ScalingSettings(1, 1000)
    low, high = sorted((a, b))
    assert settings.needed(low) <= settings.needed(high)
    assert settings.needed(high) * settings.utilization >= high - 1e-6


@pytest.mark.parametrize(
    "wrong",
    [{"min_replicas": 0}, {"min_replicas": 3, "max_replicas": 2}, {"utilization": 0}, {"utilization": 1.1},
     {"up_delay": -1}, {"down_delay": float("nan")}, {"smoothing": 0}, {"hysteresis": float("inf")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScalingSettings(**{"max_replicas": 4, **wrong})


def test_the_policy_reads_rays_context() -> None:
    policy = WorkPolicy(**policy_arguments(ScalingSettings(1, 5, up_delay=0, smoothing=1e-3)))
    context = SimpleNamespace(aggregated_metrics={METRIC: {"a": 0.0}}, policy_state={}, target_num_replicas=2)
    replicas, state = policy(context)
    assert (replicas, state["work"]) == (2, 0.0)
    context.policy_state, context.aggregated_metrics = state, {METRIC: {"a": 1000.0}}
    assert policy(context)[0] == 5
    for nothing in (None, {}, {METRIC: {}}):
        context.aggregated_metrics = nothing
        assert policy(context)[0] == 2


# ---- the loop of dial and replicas -------------------------------------------------------------------------------------------


@dataclass
class Replica:
    """One replica: its own scheduler and one worker."""

    scheduler: Scheduler
    meter: WorkMeter = field(default_factory=WorkMeter)
    samples: int = 0
    running: Batch | None = None
    ratio: float = 0.0


@dataclass
class Second:
    """What one second of the simulation showed."""

    replicas: int
    ratio: float
    answered: int
    met: int


def simulate(
    rates: list[tuple[float, float]], settings: ScalingSettings, start_delay: float, error: float = 1.0
) -> list[Second]:
    """Poisson arrivals at the given (seconds, samples per second), spread at random over the replicas that run. Replicas start
    `start_delay` after they were asked for; those given up finish what they hold. `error`: real time of the top ratio over that
    of the table."""
    random_numbers = random.Random(7)
    ids = itertools.count()
    replicas = [Replica(Scheduler(TABLE, Settings(slo=SLO, max_batch=4), make_policy("lookahead")))]
    leaving: list[Replica] = []
    starting: list[float] = []
    events: list[tuple[float, int, str, Any]] = []
    seconds: list[Second] = []
    deadlines: dict[int, float] = {}
    state: dict[str, Any] = {}
    names = {0: replicas[0]}
    end = 0.0
    for span, rate in rates:
        at = end
        while (at := at + random_numbers.expovariate(rate)) < end + span:
            heapq.heappush(events, (at, next(ids), "arrival", None))
        end += span
    for second in range(1, int(end) + 1):
        heapq.heappush(events, (float(second), next(ids), "tick", None))
    answered = met = 0
    ratio_sum = 0.0

    def give_out(now: float, replica: Replica) -> None:
        if replica.running is not None:
            return
        replica.running = batch = replica.scheduler.next_batch(now)
        replica.scheduler.take_expired()
        if batch is not None:
            real = TABLE.latency(batch.index, batch.samples) * (error if batch.index == 2 else 1.0)
            replica.ratio = TABLE.ratios[batch.index]
            heapq.heappush(events, (now + real, next(ids), "done", (replica, batch, real)))

    while events:
        now, id, kind, what = heapq.heappop(events)
        if kind == "arrival":
            replica = random_numbers.choice(replicas)
            replica.samples += 1
            deadlines[id] = now + SLO
            replica.scheduler.submit(now, Request(id, now, now + SLO, now + SLO, 1, 2))
            give_out(now, replica)
        elif kind == "done":
            replica, batch, real = what
            replica.running = None
            replica.scheduler.completed(now, batch, real)
            for request in batch.requests:
                answered, met = answered + 1, met + (now <= deadlines.pop(request.id))
                ratio_sum += TABLE.ratios[batch.index]
            give_out(now, replica)
        else:
            for due in [t for t in starting if t <= now]:
                starting.remove(due)
                replicas.append(Replica(Scheduler(TABLE, Settings(slo=SLO, max_batch=4), make_policy("lookahead"))))
                names[len(names)] = replicas[-1]
            reports = {str(i): r.meter.read(r.scheduler, r.samples) for i, r in names.items() if r in replicas}
            present = len(replicas) + len(starting)
            wanted, state = decide(now, reports, present, settings, state)
            starting += [now + start_delay] * max(0, wanted - present)
            for _ in range(max(0, present - wanted)):
                leaving.append(replicas.pop())
            seconds.append(Second(len(replicas), ratio_sum / max(answered, 1), answered, met))
            answered = met = 0
            ratio_sum = 0.0
    return seconds


LOOP = ScalingSettings(1, 6, utilization=0.7, up_delay=15, down_delay=90, hysteresis=0.2, smoothing=10)
# 8-bit carries 50 samples/s on a replica, the top ratio 77: quiet, a lasting burst that only the dial can carry, quiet again
QUIET, BURST = 26.0, 62.0


def changes(values: list[int]) -> int:
    return sum(a != b for a, b in itertools.pairwise(values))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("error", [1.0, 1.1, 0.9])
def test_dial_at_once_replicas_later_and_no_fight(error: float) -> None:
    """Burst: the dial goes up within seconds; replicas come after their delays; the dial returns to 8-bit with the burst still
    on; the replicas go after it. Each changes its mind once per step of the load, also with a table that is wrong by a tenth."""
    start_delay = 40.0
    seconds = simulate([(60, QUIET), (240, BURST), (240, QUIET)], LOOP, start_delay, error)
    before, early, late, after = seconds[20:60], seconds[63:85], seconds[200:300], seconds[480:540]
    assert mean([s.ratio for s in before]) < 0.1
    assert mean([s.ratio for s in early]) > 0.5, "the dial did not carry the burst"
    assert {s.replicas for s in early} == {1}, "replicas came before they can"
    assert mean([s.ratio for s in late]) < 0.1, "the dial did not return although replicas came"
    assert {s.replicas for s in late} == {2}
    assert mean([s.ratio for s in after]) < 0.1
    assert {s.replicas for s in after} == {1}
    assert changes([s.replicas for s in seconds]) == 2, "replicas came and went more than once"
    came = next(i for i, s in enumerate(seconds) if s.replicas == 2)
    assert 60 + LOOP.up_delay + start_delay <= came <= 60 + LOOP.up_delay + start_delay + 15
    if error <= 1.0:  # the top ratio really carries the burst
        share = sum(s.met for s in seconds[63:300]) / sum(s.answered for s in seconds[63:300])
        assert share > 0.98


def test_the_signal_does_not_depend_on_the_dial() -> None:
    """The same arrivals with the dial free and with the dial forced to either end: the same replicas at the same seconds."""
    meters = []
    for policy in ("fixed:0", "fixed:1", "lookahead"):
        scheduler = Scheduler(TABLE, Settings(slo=SLO, max_batch=4), make_policy(policy))
        meter, now, samples = WorkMeter(), 0.0, 0
        for i in range(2000):
            now += 1 / 60.0
            samples += 1
            scheduler.submit(now, Request(i, now, now + SLO, now + SLO, 1, 2))
            batch = scheduler.next_batch(now)
            if batch is not None:
                scheduler.completed(now, batch, TABLE.latency(batch.index, batch.samples))
        meters.append(meter.read(scheduler, samples))
    assert meters[0] == pytest.approx(2000 * EIGHT_BIT, rel=1e-6)
    assert meters[1] == pytest.approx(meters[0], rel=1e-6) and meters[2] == pytest.approx(meters[0], rel=1e-6)


def test_refused_requests_count_as_work() -> None:
    """Four times what even the top ratio can carry: most is refused, and the signal still asks for enough replicas."""
    seconds = simulate([(120, 200.0)], ScalingSettings(1, 8, up_delay=10, smoothing=10), 1e9)
    assert sum(s.answered for s in seconds) < 0.6 * 200 * 120
    state: dict[str, Any] = {}
    scheduler = Scheduler(TABLE, Settings(slo=SLO, max_batch=4), make_policy("lookahead"))
    meter = WorkMeter()
    for i in range(200 * 30):
        now = i / 200.0
        scheduler.submit(now, Request(i, now, now + SLO, now + SLO, 1, 2))
        if i % 200 == 0:
            _, state = decide(now, {"a": meter.read(scheduler, i + 1)}, 1, LOOP, state)
    assert LOOP.needed(state["work"]) == 6


def test_a_slower_machine_asks_for_more_replicas() -> None:
    scheduler = Scheduler(TABLE, Settings(slo=SLO, max_batch=4), make_policy("fixed:1"))
    meter = WorkMeter()
    for _ in range(200):  # twice as slow, seen at the top ratio only
        scheduler.table.observe(2, 4, 2 * TABLE.latency(2, 4))
    assert meter.read(scheduler, 100) > 1.5 * 100 * EIGHT_BIT
