"""The event loop: nothing is lost, nothing depends on the machine's clock, queues behave as theory says."""

from __future__ import annotations

import dataclasses
import io
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.serving.control import Recorder, ServiceTable, Settings, replay
from bitdial.simulation import Fleet, Load, Noise, Outcome, simulate, summarize, time_series
from bitdial.simulation.balancers import BALANCERS, LeastLoaded
from bitdial.simulation.outcome import ANSWERED, EXPIRED, SHED

TABLE = ServiceTable((0.0, 0.5, 1.0), (1, 4), ((0.010, 0.036), (0.008, 0.028), (0.005, 0.018)), (0.90, 0.895, 0.87))


def poisson(rate: float, n: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


def same(a: Outcome, b: Outcome) -> bool:
    for field in dataclasses.fields(Outcome):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if not (np.array_equal(left, right, equal_nan=True) if isinstance(left, np.ndarray) and left.dtype.kind == "f"
                else np.array_equal(left, right)):  # fmt: skip
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(20, 2000),
    replicas=st.integers(1, 5),
    workers=st.integers(1, 3),
    balancer=st.sampled_from(sorted(BALANCERS)),
    policy=st.sampled_from(["lookahead", "slackfit", "ladder", "fixed:0", "fixed:1"]),
    max_wait=st.sampled_from([0.0, 0.004]),
    timeout=st.sampled_from([None, 0.03, 0.2]),
    overhead=st.sampled_from([0.0, 0.001]),
    shared=st.booleans(),
    max_queue=st.sampled_from([3, 1000]),
    samples=st.integers(1, 4),
    refuse=st.booleans(),
    seed=st.integers(0, 100),
)
def test_every_request_ends_once(
    rate, replicas, workers, balancer, policy, max_wait, timeout, overhead, shared, max_queue, samples, refuse, seed
):
    wanted = Settings(
        slo=0.05, timeout=timeout, max_batch=4, max_wait=max_wait, max_queue=max_queue, refuse_late=refuse
    )  # fmt: skip
    told: dict[int, list[str]] = {}

    def observe(replica):
        def observer(event, now, **fields):
            for id in fields.get("ids", [fields["id"]] if event == "submit" and fields["refused"] else []):
                told.setdefault(id, []).append(event)

        return observer

    load = Load(poisson(rate, 200, seed), samples)
    fleet = Fleet(replicas=replicas, workers=workers, balancer=balancer, overhead=overhead, shared_core=shared)
    outcome = simulate(TABLE, wanted, policy, load, fleet, Noise(batch=0.2), seed, observe)
    n = load.arrivals.size
    assert set(np.unique(outcome.status)) <= {ANSWERED, SHED, EXPIRED}  # none is left behind
    answered = outcome.status == ANSWERED
    assert all(told.get(id, []) == (["next"] if answered[id] else ["submit"] if outcome.status[id] == SHED else [])
               for id in range(n))  # given out once, refused once, or neither  # fmt: skip
    assert np.array_equal(np.isnan(outcome.finish), ~answered)
    assert (outcome.begun[answered] >= outcome.arrival[answered]).all()
    assert (outcome.finish[answered] > outcome.begun[answered]).all()
    assert ((outcome.replica >= 0) & (outcome.replica < replicas)).all()
    assert outcome.busy <= replicas * workers * outcome.end * (1 + 1e-9)
    figures = summarize(outcome, TABLE, wanted.slo)
    assert (
        figures.answered + figures.shed + figures.expired
        == n
        == figures.met + figures.late + figures.shed + figures.expired
    )
    rows = time_series(outcome, TABLE, wanted.slo, 0.1)
    assert sum(row.arrived for row in rows) == n and sum(row.met for row in rows) == figures.met


def test_engines_run_one_batch_at_a_time():
    load = Load(poisson(600, 2000))
    outcome = simulate(TABLE, Settings(slo=0.1, max_batch=4), "slackfit", load, Fleet(replicas=3, balancer="round-robin"))
    for replica in range(3):
        mine = (outcome.replica == replica) & (outcome.status == ANSWERED)
        spans = np.unique(np.stack([outcome.begun[mine], outcome.finish[mine]], 1), axis=0)
        assert (spans[1:, 0] >= spans[:-1, 1] - 1e-12).all()


def test_same_seed_same_result_whatever_the_clock(monkeypatch):
    def run(seed):
        return simulate(TABLE, Settings(slo=0.05, max_batch=4), "lookahead", Load(poisson(700, 1500)),
                        Fleet(replicas=4, overhead=2e-4, shared_core=True), Noise(batch=0.1, replica=0.1), seed)  # fmt: skip

    first = run(1)

    def no_clock(*arguments):
        raise AssertionError("the simulation asked for the machine's clock")

    for name in ("time", "monotonic", "perf_counter", "monotonic_ns", "time_ns", "perf_counter_ns"):
        monkeypatch.setattr(time, name, no_clock)
    again, other = run(1), run(2)
    monkeypatch.undo()
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_mean_wait_is_that_of_theory(load):
    """M/D/1, exactly by Lindley's recursion, and on average by Pollaczek and Khinchine: load * service / (2 (1 - load))."""
    service, n = 0.01, 25_000
    table = ServiceTable((0.0,), (1,), ((service,),), (None,))
    patient = Settings(slo=1e3, max_batch=1, max_queue=10**6)
    arrivals = poisson(load / service, n, 5)
    outcome = simulate(table, patient, "fixed:0", Load(arrivals), noise=Noise(batch=0.0))
    waits = [0.0]
    for gap in np.diff(arrivals):
        waits.append(max(0.0, waits[-1] + service - gap))
    assert np.allclose(outcome.begun - outcome.arrival, waits, atol=1e-7)
    figures = summarize(outcome, table, 1e3)
    assert figures.answered == n
    assert figures.mean_wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.12)
    assert figures.utilisation == pytest.approx(load, rel=0.02)


def test_several_engines_are_one_queue():
    """M/M/2 has a closed form; service times that are lognormal with a tiny spread lie between it and none: M/D/2."""
    service, load = 0.01, 0.8
    table = ServiceTable((0.0,), (1,), ((service,),), (None,))
    arrivals = Load(poisson(2 * load / service, 25_000, 6))
    outcome = simulate(
        table, Settings(slo=1e3, max_batch=1, max_queue=10**6), "fixed:0", arrivals, Fleet(workers=2), Noise(batch=0.0)
    )
    exponential = load**2 / (1 - load**2) * service  # mean wait of M/M/2
    wait = summarize(outcome, table, 1e3).mean_wait
    assert wait == pytest.approx(
        exponential / 2, rel=0.12
    )  # deterministic service waits about half as long (Cosmetatos)


def test_overhead_delays_and_a_shared_core_slows():
    table = ServiceTable((0.0,), (1,), ((0.01,),), (None,))

    def latency(gap, fleet):
        load = Load(np.arange(200) * gap)
        return simulate(table, Settings(slo=10.0, max_batch=1), "fixed:0", load, fleet, Noise(batch=0.0)).latency

    assert np.allclose(latency(0.02, Fleet()), 0.010)
    assert np.allclose(latency(0.02, Fleet(overhead=0.002)), 0.012)
    # On one core the server's thread takes 1 ms per arrival, so an engine that needs 10 ms, and 1 ms per answer, falls behind.
    shared = latency(0.0115, Fleet(overhead=0.002, shared_core=True))
    assert shared[150] - shared[50] == pytest.approx(100 * (0.011 / (1 - 1 / 11.5) - 0.0115), rel=0.03)
    apart = latency(0.0115, Fleet(overhead=0.002))
    assert apart.max() < 0.014  # the server's thread has its own small queue


@pytest.mark.parametrize("policy", ["lookahead", "slackfit:dwell=0.2", "ladder", "fixed:0.5"])
def test_a_recorded_simulation_replays(policy):
    stream, wanted = io.StringIO(), Settings(slo=0.05, max_batch=4, max_wait=0.002)
    recorder = Recorder(stream, TABLE, wanted, policy, 2)
    simulate(TABLE, wanted, policy, Load(poisson(500, 1500)), Fleet(replicas=2, workers=2, overhead=1e-4), Noise(batch=0.1), 3,
             observer=lambda replica: recorder if replica == 0 else None)  # fmt: skip
    lines = stream.getvalue().splitlines()
    assert sum('"event": "next"' in line for line in lines) > 200
    assert replay(lines) == []
    at = next(i for i, line in enumerate(lines) if json.loads(line).get("index") is not None)
    row = json.loads(lines[at])
    lines[at] = json.dumps({**row, "index": (row["index"] + 1) % 3})
    assert replay(lines)  # and it would be noticed


def test_a_thousand_replicas():
    replicas = 1000
    outcome = simulate(
        TABLE, Settings(slo=0.05, max_batch=4), "lookahead", Load(poisson(replicas * 90, 10_000)), Fleet(replicas=replicas)
    )
    figures = summarize(outcome, TABLE, 0.05)
    assert figures.attainment > 0.99
    assert np.unique(outcome.replica).size == replicas


def test_balancers_differ_as_known():
    """The longest waits: round robin over random requests is worst, two choices near the best (Mitzenmacher)."""
    load, wanted = Load(poisson(10 * 160, 8_000, 1)), Settings(slo=1.0, max_batch=1)
    waits = {
        name: summarize(
            simulate(TABLE, wanted, "fixed:1", load, Fleet(replicas=10, balancer=name), Noise(batch=0.5)), TABLE, 1.0
        ).mean_wait
        for name in BALANCERS
    }
    assert waits["least-loaded"] < waits["power-of-two"] < waits["round-robin"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 3)), max_size=200))
def test_least_loaded_is_least_loaded(changes):
    load = [0] * 7
    balancer = LeastLoaded(load, 0)
    for replica, change in changes:
        load[replica] += change
        balancer.changed(replica)
        assert load[balancer.pick()] == min(load)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fleet(replicas=0),
        lambda: Fleet(workers=0),
        lambda: Fleet(overhead=float("nan")),
        lambda: Noise(batch=-1.0),
        lambda: Noise(factor=0.0),
        lambda: Load(np.array([])),
        lambda: Load(np.array([1.0, 0.5])),
        lambda: Load(np.array([0.0, np.inf])),
        lambda: Load(np.array([0.0]), samples=0),
        lambda: simulate(TABLE, Settings(), "fixed:0", Load(np.array([0.0])), Fleet(balancer="best")),
        lambda: simulate(TABLE, Settings(), "best", Load(np.array([0.0]))),
        lambda: time_series(simulate(TABLE, Settings(), "fixed:0", Load(np.array([0.0]))), TABLE, 0.1, 0.0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ConfigError):
        make()
