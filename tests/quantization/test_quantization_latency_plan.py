"""From a table to a plan: widths per layer, a latency-aware choice of layers, and what the file says about both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitdial.artifact import load_program, save_program
from bitdial.cli.reading import parse_low_bits
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError, SelectionError
from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.latency_table import LatencyTable, LayerShape, LayerTimes, layer_shape
from bitdial.quantization.predicted_latency import latency_curves

# Cheap shifts, no reconstruction of rounding: neither matters here.
CONFIG = QuantizeConfig(
    target="paper",
    calibration_images=48, search_images=24, population=8, generations=3, survivors=3, group_size=8, batch_size=48,
    shift_choice="plain", low_weights="derived", bias_correction=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Any, Any, Any]:
    """The digits network, trained for two epochs, calibration images, test images and labels."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from bitdial.zoo.digits import load_digits_split, train_digits

    train, _, test, labels = load_digits_split(0)
    return train_digits(0, 2), torch.from_numpy(train[:48]), torch.from_numpy(test), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def prepared(digits: Any) -> Prepared:
    return prepare(digits[0], [digits[1]], CONFIG)


def shapes(prepared: Prepared) -> dict[str, LayerShape]:
    graph = prepared.graph
    return {
        n.name: layer_shape(n, graph.types, graph.constants[n.weight].shape)
        for n in graph.nodes
        if n.weight is not None
    }


def make_table(prepared: Prepared, times: Callable[[LayerShape], dict[str, Any]]) -> LatencyTable:
    layers = {s.key: LayerTimes(shape=s, **times(s)) for s in shapes(prepared).values()}
    return LatencyTable(target="synthetic", cpu="none", isa="none", threads=1, batch=1, layers=layers)


@pytest.fixture(scope="module")
def two_layers(prepared: Prepared) -> tuple[LatencyTable, set[str]]:
    """Only two of the layers save time, and only when nearly all of each is low.

    The two 3x3 layers of 64 x 16 multiplies per position in the first block: a quarter of all eligible work.
    """

    def times(shape: LayerShape) -> dict[str, Any]:
        direct = shape.macs * 1e-11
        if shape.in_channels == shape.out_channels == 64:
            return {
                "seconds": {"direct": direct, "winograd_fip": 0.4 * direct},
                "mixed": ((0.25, 1.02 * direct), (0.5, 1.02 * direct), (0.8, 0.98 * direct)),
            }
        return {"seconds": {"direct": direct}}

    names = {n for n, s in shapes(prepared).items() if s.in_channels == s.out_channels == 64}
    assert len(names) == 2
    return make_table(prepared, times), names


@pytest.mark.parametrize("selector", ["evolutionary", "greedy"])
def test_half_the_work_low_buys_two_fifths_of_the_gain(
    prepared: Prepared, two_layers: Any, digits: Any, selector: str
) -> None:
    table, names = two_layers
    config = CONFIG.updated(latency_table=table, selector=selector)
    plain = quantize_prepared(prepared, config)
    program = quantize_prepared(prepared, config.updated(latency_gain=0.8))
    told = program.provenance["latency"]
    assert told["gain_share"][0] == 0.0 and told["gain_share"][-1] == pytest.approx(1.0)
    assert (np.array(told["gain_share"]) >= 0.8 * np.array(program.ratios) - 1e-6).all()
    assert told["gain_share"][2] >= 0.4
    # Accuracy alone leaves the two layers partly high: there is something for the goal to do.
    assert plain.provenance["latency"]["gain_share"][2] < 0.4
    assert program.nested and all((la.low[:-1] <= la.low[1:]).all() for la in program.layers.values() if la.n_groups)
    filled = [n for n in names if program.layers[n].low[2].all()]
    assert filled
    for index, ratio in enumerate(program.ratios):
        assert program.eligible_share(index) == pytest.approx(ratio, abs=0.01)
    # The seconds are those of the table, layer by layer.
    expected = sum(s.macs * 1e-11 for s in shapes(prepared).values())
    assert told["seconds"][0] == pytest.approx(expected)
    saved = sum(0.6 * shapes(prepared)[n].macs * 1e-11 for n in names)
    assert told["seconds"][0] - told["seconds"][-1] == pytest.approx(saved)
    assert told["target"] == "synthetic" and told["layers"][filled[0]]["mechanism"] == "winograd_fip"
    # Measured here: both plans within two images of each other at 50 %.
    accuracy = [
        float((ReferenceEngine(p).run(digits[2], 0.5).argmax(1) == digits[3]).float().mean()) for p in (plain, program)
    ]
    assert accuracy[1] >= accuracy[0] - 0.02


def test_a_search_with_a_goal_resumes_and_refuses_another_table(
    prepared: Prepared, two_layers: Any, tmp_path: Path
) -> None:
    table, _ = two_layers
    config = CONFIG.updated(latency_table=table, latency_gain=0.8, ratios=(0.0, 0.5), population=6, generations=2)
    path = tmp_path / "search.json"

    def stop(stage: str, share: float) -> None:
        if stage == "search" and share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_prepared(prepared, config, checkpoint=path, progress=stop)
    other = table.model_copy(update={"target": "another machine"})
    with pytest.raises(SelectionError, match="latency differ"):
        quantize_prepared(prepared, config.updated(latency_table=other), checkpoint=path)
    resumed = quantize_prepared(prepared, config, checkpoint=path)
    whole = quantize_prepared(prepared, config)
    for name, layer in whole.layers.items():
        np.testing.assert_array_equal(layer.low, resumed.layers[name].low)


def test_auto_is_wider_where_the_table_says_that_costs_nothing(prepared: Prepared, digits: Any, tmp_path: Path) -> None:
    def times(shape: LayerShape) -> dict[str, Any]:
        direct = shape.macs * 1e-11
        if shape.out_channels == 64:  # the fast form is only for 4 bits: 9w + 2a <= 127 leaves 31, 7
            return {"seconds": {"direct": direct, "fip": 0.9 * direct, "winograd_fip": 0.5 * direct}} if shape.winograd else {
                "seconds": {"direct": direct}
            }  # fmt: skip
        return {"seconds": {"direct": direct, "fip": 0.7 * direct}}

    table = make_table(prepared, times)
    config = CONFIG.updated(selector="greedy", target="avx2", latency_table=table, ratios=(0.0, 1.0))
    program = quantize_prepared(prepared, config)
    narrow = quantize_prepared(prepared, config.updated(low_bits=4, latency_table=None))
    own = shapes(prepared)
    widths = program.provenance["widths"]
    assert set(widths) == {n for n, layer in program.layers.items() if layer.eligible}
    seen = set()
    for name, layer in program.layers.items():
        if not layer.eligible:
            assert (layer.amax, layer.wmax) == (narrow.layers[name].amax, narrow.layers[name].wmax)
            continue
        expected = (31, 7) if own[name].winograd and own[name].out_channels == 64 else (63, 63)
        assert (layer.amax, layer.wmax) == expected == (widths[name]["amax"], widths[name]["wmax"])
        assert widths[name]["seconds"] <= 1.15 * widths[name]["seconds_4bit"] and widths[name]["estimated_from"] is None
        seen.add(expected)
    assert seen == {(31, 7), (63, 63)}
    # Nearly the same predicted time, much less error.
    assert program.provenance["latency"]["seconds"][1] == pytest.approx(
        sum(widths[n]["seconds"] if n in widths else own[n].macs * 1e-11 * _rest(table, own[n]) for n in own)
    )
    images = digits[2][:64]
    distance = []
    for p in (program, narrow):
        engine = ReferenceEngine(p)
        exact = engine.run(images, 0.0)
        distance.append(float((engine.run(images, 1.0) - exact).pow(2).mean() / exact.pow(2).mean()))
    assert distance[0] < 0.5 * distance[1]
    # Readers of one tensor that differ in width have shifts of their own: conv1 (31) and the projection (63) of block2.
    readers: dict[str, set[int]] = {}
    for name, layer in program.layers.items():
        if layer.eligible:
            readers.setdefault(program.graph.node(name).inputs[0], set()).add(layer.amax)
    path = tmp_path / "auto.bitdial"
    save_program(program, path)
    again = load_program(path)
    for name, layer in program.layers.items():
        assert (again.layers[name].amax, again.layers[name].wmax) == (layer.amax, layer.wmax)
    assert again.provenance["widths"] == widths
    assert again.provenance["config"]["latency_table"]["sha256"] == table.digest


def _rest(table: LatencyTable, shape: LayerShape) -> float:
    """What the layers that stay at 8 bits cost, as a multiple of their direct time."""
    return table.times(shape).seconds["direct"] / (shape.macs * 1e-11)


def test_readers_of_one_tensor_with_different_widths_have_their_own_shifts(prepared: Prepared) -> None:
    def times(shape: LayerShape) -> dict[str, Any]:
        if shape.kernel == (1, 1):
            return {"seconds": {"direct": 1.0, "fip": 0.5}}
        return {"seconds": {"direct": 2.0, "winograd_fip": 1.0, "fip": 1.9} if shape.winograd else {"direct": 1.0}}

    config = CONFIG.updated(
        selector="greedy", target="avx2", latency_table=make_table(prepared, times), ratios=(0.0, 1.0),
    )  # fmt: skip
    program = quantize_prepared(prepared, config)
    pairs = {}
    for name, layer in program.layers.items():
        if layer.eligible:
            pairs.setdefault(program.graph.node(name).inputs[0], []).append(layer)
    shared = [layers for layers in pairs.values() if len({layer.amax for layer in layers}) > 1]
    assert shared
    for layers in shared:
        wide, narrow = sorted(layers, key=lambda layer: -layer.amax)[:2]
        step = wide.amax.bit_length() - narrow.amax.bit_length()
        np.testing.assert_array_equal(
            np.maximum(narrow.activation_shift.astype(int) - step, 0), wide.activation_shift.astype(int)
        )


def test_curves_of_layers_that_stay_at_8_bits_are_flat(prepared: Prepared, two_layers: Any) -> None:
    program = quantize_prepared(
        prepared, CONFIG.updated(selector="greedy", latency_table=two_layers[0], keep_8bit=("block1*",))
    )
    curves = latency_curves(program, two_layers[0])
    for name in two_layers[1]:
        assert not program.layers[name].eligible and curves[name].mechanism == "direct"
        assert curves[name].at([0.0, 0.5, 1.0]).tolist() == [curves[name].seconds[0]] * 3
    assert program.provenance["latency"]["gain_share"] == [None] * 5


def test_low_bits_of_the_command_line() -> None:
    assert parse_low_bits("auto") == "auto" and parse_low_bits("5") == 5
    with pytest.raises(ConfigError, match="--low-bits many"):
        parse_low_bits("many")
