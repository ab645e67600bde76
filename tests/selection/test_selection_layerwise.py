"""Layer-wise plans from given evidence: budgets, orders, metrics, baselines, settings. No network runs here."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial.errors import BudgetError, ConfigError, SelectionError
from bitdial.selection.layerwise import (
    ALL_METRICS,
    METRICS,
    LayerEvidence,
    LayerOptions,
    LayerwiseConfig,
    Option,
    Plan,
    first_last,
    layer_losses,
    make_plan,
    meet_floor,
    metric_values,
    one_by_one,
    random_losses,
    weight_bytes,
)
from bitdial.selection.layerwise.plan import worth_having

NAMES = ("low", "int8", "float32")


def evidence(name: str, noise: float, output: float = 0.1, before: float = 0.02, **changes: Any) -> LayerEvidence:
    values: dict[str, Any] = {
        "source": name, "precisions": NAMES, "probe": "low", "input_noise": before, "output_noise": output,
        "output_error": 10 * noise, "parameters": 100, "macs": 1000,
        "weight_noise": {"low": noise, "int8": noise / 100, "float32": 0.0},
        "activation_noise": {"low": 2 * noise, "int8": noise / 50, "float32": 0.0},
        "added_noise": {"low": 3 * noise, "int8": noise / 40, "float32": 0.0},
        "propagated_noise": {"low": 5 * noise, "int8": noise / 30, "float32": 0.0},
    }  # fmt: skip
    return LayerEvidence(name=name, **{**values, **changes})


@st.composite
def choices(draw: st.DrawFn) -> list[LayerOptions]:
    positive = st.floats(0.01, 100.0)
    layers = []
    for index in range(draw(st.integers(1, 8))):
        options = [Option(p, draw(positive), draw(positive), draw(positive)) for p in NAMES[: draw(st.integers(1, 3))]]
        layers.append(LayerOptions(f"layer{index}", tuple(options)))
    return layers


@given(choices(), st.floats(0.2, 3.0), st.floats(0.2, 3.0), st.sampled_from(["density", "score"]), st.integers(1, 3))
def test_a_plan_meets_its_budgets_or_says_what_is_nearest(
    layers: list[LayerOptions], size_share: float, time_share: float, order: str, which: int
) -> None:
    least_size = sum(min(o.size for o in layer.options) for layer in layers)
    least_time = sum(min(o.seconds for o in layer.options) for layer in layers)
    size = size_share * least_size if which & 1 else None
    seconds = time_share * least_time if which & 2 else None
    try:
        plan = make_plan(layers, size=size, seconds=seconds, order=order)
    except BudgetError as error:
        hopeless = (size is not None and least_size > size) or (seconds is not None and least_time > seconds)
        assert hopeless or which == 3  # each alone can be met
        assert error.nearest >= min(least_size, least_time) * 0.999
        return
    assert size is None or plan.size <= size * 1.0001
    assert seconds is None or plan.seconds <= seconds * 1.0001
    assert plan.precisions.keys() == {layer.name for layer in layers}
    start = plan.prefix(0)
    assert plan.loss <= start.loss + 1e-9
    replayed = dict(start.chosen)
    for step in plan.steps:
        assert replayed[step.layer] == step.before and step.after.loss < step.before.loss
        replayed[step.layer] = step.after
    assert replayed == plan.chosen


@given(choices())
def test_without_limits_every_layer_ends_at_its_least_loss(layers: list[LayerOptions]) -> None:
    plan = make_plan(layers)
    for layer in layers:
        assert plan.chosen[layer.name].loss == min(o.loss for o in layer.options)


@given(choices())
def test_steps_worth_having_gain_less_and_less_per_price(layers: list[LayerOptions]) -> None:
    for layer in layers:
        ladder = worth_having(layer.options, lambda o: o.size)
        gains = [(a.loss - b.loss) / (b.size - a.size) for a, b in zip(ladder[:-1], ladder[1:], strict=True)]
        assert all(g > 0 for g in gains)
        assert all(a >= b * (1 - 1e-9) for a, b in zip(gains[:-1], gains[1:], strict=True))


def test_sensitive_layers_get_the_higher_precision() -> None:
    layers = [
        LayerOptions(name, (Option("low", loss, 50.0, 1.0), Option("int8", loss / 100, 100.0, 2.0)))
        for name, loss in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    ]
    for order in ("density", "score"):
        assert make_plan(layers, size=250.0, order=order).precisions == {"a": "low", "b": "int8", "c": "int8"}
        assert make_plan(layers, seconds=4.0, order=order).precisions == {"a": "low", "b": "int8", "c": "low"}
    with pytest.raises(BudgetError, match="at least 150") as caught:
        make_plan(layers, size=149.0)
    assert caught.value.nearest == 150.0
    with pytest.raises(SelectionError, match="order"):
        make_plan(layers, order="best")
    with pytest.raises(SelectionError, match="needs layers"):
        make_plan([])


def test_density_prefers_the_small_layer_and_score_the_sensitive_one() -> None:
    layers = [
        LayerOptions("large", (Option("low", 2.0, 500.0, 1.0), Option("int8", 0.0, 1000.0, 1.0))),
        LayerOptions("small", (Option("low", 1.0, 5.0, 1.0), Option("int8", 0.0, 10.0, 1.0))),
    ]
    assert make_plan(layers, size=1005.0, order="score").precisions == {"large": "int8", "small": "low"}
    assert make_plan(layers, size=1004.0, order="density").precisions == {"large": "low", "small": "int8"}


def test_an_accuracy_floor_takes_the_shortest_prefix_that_was_measured() -> None:
    layers = [LayerOptions(f"l{i}", (Option("low", 1.0 + i, 1.0, 1.0), Option("int8", 0.0, 2.0, 1.0))) for i in range(40)]
    plan, calls = make_plan(layers), []

    def measure(candidate: Plan) -> float:
        calls.append(len(candidate.steps))
        return 0.5 + 0.01 * len(candidate.steps)

    found = meet_floor(plan, 0.745, measure)
    assert len(found.plan.steps) == 25 and found.accuracy == pytest.approx(0.75)
    assert len(calls) == len(set(calls)) <= 8
    assert meet_floor(plan, 0.0, measure).plan.steps == []
    with pytest.raises(BudgetError, match="90.00 %") as caught:
        meet_floor(plan, 0.95, measure)
    assert caught.value.nearest == pytest.approx(0.9)


def test_each_metric_ranks_by_what_it_names() -> None:
    calm, loud = evidence("calm", 1e-3, output=0.03), evidence("loud", 1e-2, output=0.5)
    for metric in ALL_METRICS:
        losses = layer_losses([calm, loud], [metric])
        assert losses["loud"]["low"] > losses["calm"]["low"] > losses["calm"]["int8"] > losses["calm"]["float32"] == 0.0
        assert losses["calm"]["low"] + losses["loud"]["low"] == pytest.approx(1.0)
    assert metric_values(loud, "sqnr")["int8"] == 1e-2 / 40
    assert metric_values(loud, "sqnr", "output")["low"] == 0.5
    assert metric_values(loud, "sqnr", "power")["low"] == pytest.approx(0.48)
    assert metric_values(loud, "sqnr", "decibel")["low"] == pytest.approx(13.979, abs=1e-3)
    assert metric_values(evidence("r", 1e-2, output=0.1, before=0.2), "sqnr", "power")["low"] == 0.0
    both = layer_losses([calm, loud], ["weight", "mse"])
    single = [layer_losses([calm, loud], [m]) for m in ("weight", "mse")]
    assert both["calm"]["int8"] == pytest.approx(sum(s["calm"]["int8"] for s in single) / 2)
    with pytest.raises(SelectionError, match="choose among"):
        layer_losses([calm], ["entropy"])
    with pytest.raises(SelectionError, match="no metric"):
        layer_losses([calm], [])
    with pytest.raises(SelectionError, match="not finite"):
        layer_losses([evidence("bad", float("nan"))], ["weight"])


def test_baselines_rank_as_named() -> None:
    layers = [evidence(f"l{i}", 1e-3 * (1 + i)) for i in range(5)]
    calls: list[tuple[str, str]] = []

    def measure(name: str, precision: str) -> float:
        calls.append((name, precision))
        return {"l0": 0.5, "l3": -0.1}.get(name, 0.2)

    losses = one_by_one(layers, measure)
    assert calls == [(layer.name, "low") for layer in layers]  # one validation run per layer
    assert losses["l0"]["low"] == 0.5 and losses["l3"]["low"] == 0.0 and losses["l1"]["float32"] == 0.0
    assert random_losses(layers, 1) == random_losses(layers, 1) != random_losses(layers, 2)
    ends = first_last(layers, {"l0", "l4"})
    assert min(ends["l0"]["low"], ends["l4"]["low"]) > 1e3 * max(ends[n]["low"] for n in ("l1", "l2", "l3"))


def test_bytes_of_weights() -> None:
    assert weight_bytes("float32", 100, 10, 7, False) == 440 and weight_bytes("bfloat16", 100, 10, 7, False) == 240
    assert weight_bytes("int8", 100, 10, 7, False) == 220
    assert weight_bytes("low", 100, 10, 7, False) == 50 + 120 and weight_bytes("low", 100, 10, 7, True) == 220
    assert weight_bytes("low", 100, 10, 3, False) == 38 + 120
    assert weight_bytes("low", 100, 10, 7, True, stored=True) == 270 and weight_bytes("int8", 100, 10, 7, True, True) == 220
    assert weight_bytes("low", 100, 10, 7, False, stored=True) == 50 + 120


def test_settings_are_checked_and_named() -> None:
    config = LayerwiseConfig(budget_size="80%", precisions="float32,int8".split(","), metric="sqnr+weight")
    assert config.precisions == ("int8", "float32") and config.metric == ("weight", "sqnr")
    assert LayerwiseConfig(budget_size=1e6).metric == ("propagated",)
    assert LayerwiseConfig(budget_size=1e6, metric="combined").metric == METRICS
    assert LayerwiseConfig(budget_size=1e6, metric="propagated+mse").metric == ("mse", "propagated")
    assert config.updated(order="score").order == "score"
    for changes, told in (
        ({}, "needs a budget"),
        ({"budget_size": "big"}, "budget_size"),
        ({"budget_size": -1}, "above 0"),
        ({"budget_size": 1, "precisions": ()}, "precisions"),
        ({"budget_size": 1, "precisions": ("int4",)}, "precisions"),
        ({"budget_size": 1, "metric": "entropy"}, "metric"),
        ({"budget_latency": 0.01}, "share"),
        ({"budget_latency": "80%", "latency": "table"}, "latency_table"),
        ({"accuracy_floor": 1.5}, "accuracy_floor"),
        ({"budget_size": 1, "relative_time": {"int8": 0.0}}, "relative_time"),
        ({"budget_size": 1, "depth": 3}, "depth"),
    ):
        with pytest.raises(ConfigError, match=told):
            LayerwiseConfig(**changes)
