"""ERQ-, IGQ-ViT- and QDrop-like: their roundings and groups by hand, and that they beat what they start from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError
from bitdial.pipeline import Prepared
from comparison import METHODS, Built, Ground, Settings, build_all
from comparison.erq import halved_rounding, turned_rounding
from comparison.instance_groups import channel_ends, fit_quantizers, grouped, nearest
from comparison.qdrop import SoftWeight
from comparison.sqnr import float_outputs
from comparison.uniform import uniform_program


def error(rounded: np.ndarray, target: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    e = rounded - target
    return np.einsum("oi,ij,oj->o", e, covariance, e)


def test_a_rounding_is_turned_where_errors_add_up() -> None:
    """Two inputs that are always equal: 0.4 + 0.4 is nearer to 1 + 0 than to 0 + 0."""
    target = np.array([[0.4, 0.4], [0.1, 0.2], [7.4, 7.4]])
    rounded = turned_rounding(target, np.ones((2, 2)) + 1e-6 * np.eye(2), 7)
    assert sorted(rounded[0]) == [0, 1] and rounded[1].tolist() == [0, 0] and rounded[2].tolist() == [7, 7]


def test_roundings_beat_the_nearest_and_halves_beat_one_go() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 40)) + 0.3 * rng.normal(size=(400, 40))
    covariance, target = x.T @ x / 400, 3.0 * rng.normal(size=(20, 40))
    near = error(np.clip(np.rint(target), -7, 7), target, covariance)
    turned = error(turned_rounding(target, covariance, 7), target, covariance)
    halved = error(halved_rounding(target, covariance, 7), target, covariance)
    assert (turned <= near + 1e-9).all() and halved.sum() < 0.95 * turned.sum() < 0.2 * near.sum()
    assert np.array_equal(halved_rounding(np.array([[2.3, -9.0]]), np.eye(2), 7), [[2, -7]])


def test_channels_of_a_sample_take_the_quantizer_of_their_range() -> None:
    x = torch.tensor([[[0.0, 10.0], [3.0, 200.0]], [[0.0, 190.0], [1.0, 12.0]]])  # [samples, tokens, channels]
    ends = channel_ends(x, 2)
    assert ends.tolist() == [[[0, 3], [0, 200]], [[0, 1], [0, 190]]]
    quantizers = torch.tensor([[0.0, 3.0], [0.0, 195.0]])
    assert nearest(ends, quantizers).tolist() == [[0, 1], [0, 1]]
    found = grouped(x, 2, quantizers, 4, 0, 255)
    assert found[:, :, 0].tolist() == [[0, 3], [0, 1]]  # steps finer than an integer are none
    assert found[:, :, 1].tolist() == [[13, 195], [195, 13]]  # steps of 195 / 15, clipped at the end
    by_hand = grouped(torch.tensor([[[-8.0], [-3.0], [0.0], [7.0]]]), 2, torch.tensor([[-8.0, 22.0]]), 4, -127, 127)
    assert by_hand.flatten().tolist() == [-8.0, -4.0, 0.0, 8.0]  # steps of 2, half to even; 0 is a level


def test_quantizers_settle_on_the_ranges_that_there_are() -> None:
    ends = torch.tensor([[0.0, 1.0]] * 30 + [[-5.0, 5.0]] * 30 + [[0.0, 100.0]] * 5)
    found = fit_quantizers(ends, 3)
    assert sorted(map(tuple, found.tolist())) == [(-5.0, 5.0), (0.0, 1.0), (0.0, 100.0)]


def test_soft_weights_begin_where_they_are_and_end_at_neighbours() -> None:
    weight = torch.tensor([[0.26, -0.9], [0.5, 5.0]])
    soft = SoftWeight.of(weight, torch.tensor([0.2, 0.5]), 7)
    assert torch.allclose(soft.soft()[0], weight[0], atol=1e-3)
    assert soft.integers().tolist() == [[1, -4], [1, 7]]
    soft.penalty(2.0).backward()  # type: ignore[no-untyped-call]
    assert soft.v.grad is not None and float(soft.v.grad[0, 0]) > 0.0  # lower: nearer to a decision
    with torch.no_grad():
        soft.v.fill_(9.0)
    assert soft.integers().tolist() == [[2, -4], [2, 7]] and float(soft.penalty(2.0).detach()) == 0.0


NAMES = ("uniform", "erq", "igq", "qdrop")


@pytest.fixture(scope="module")
def few(prepared: Prepared, ground: Ground) -> Ground:
    """One small layer may run low, to save time."""
    return Ground(prepared, ground.config.updated(keep_8bit=tuple(f"conv2d_{i}" for i in (1, 2, 3, 4, 6, 7))))


@pytest.fixture(scope="module")
def built(few: Ground) -> dict[str, Built]:
    settings = Settings(iterations=20, reconstruction_batch=8)
    return {name: build_all(name, few, (4, 8), settings) for name in NAMES}


@pytest.fixture(scope="module")
def noise(few: Ground, built: dict[str, Built]) -> dict[str, float]:
    """Squared distance to the float network's outputs on the calibration images, at 4 bits."""
    x = few.prepared.inputs[0]
    exact = float_outputs(few.prepared.graph, [[x]])
    found = {}
    for name in NAMES:
        point = built[name].points[0]
        engine = point.engine or ReferenceEngine(point.program)
        found[name] = float(np.square(engine.run(x, point.ratio).numpy() - exact).sum())
    return found


@pytest.mark.parametrize("name", ["erq", "igq", "qdrop"])
def test_they_err_less_than_rounding(name: str, noise: dict[str, float]) -> None:
    assert noise[name] < 0.9 * noise["uniform"], noise


@pytest.mark.parametrize("name", ["erq", "igq", "qdrop"])
def test_they_have_one_width_and_a_copy_of_the_weights(name: str, few: Ground, built: dict[str, Built]) -> None:
    four, eight = built[name].points
    assert (four.reached, eight.reached) == (4.0, 8.0) and eight.program is few.eight and eight.engine is None
    assert METHODS[name].simulated == (four.engine is not None) == (name == "igq")
    assert built[name].switching.bytes > 0 and built[name].seconds > 0
    for layer in (four.program.layers[n] for n in few.layers):
        assert layer.weight is not None and np.abs(layer.weight).max() <= 7 and layer.low.all()


def test_weights_are_not_given_for_layers_that_are_low_in_part(ground: Ground) -> None:
    masks = {name: np.arange(len(mask)) == 0 for name, mask in ground.full_masks().items() if len(mask) > 1}
    with pytest.raises(ConfigError, match="low in part"):
        uniform_program(ground.prepared, ground.config, masks, 4, given={})
