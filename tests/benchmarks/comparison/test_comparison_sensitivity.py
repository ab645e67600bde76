"""Sensitivities against definitions written out: exact Hessian traces, constructed feature maps, plain noise ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitdial.errors import CalibrationError
from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from comparison import Ground
from comparison.hessian import hutchinson, layer_traces
from comparison.separability import class_means, layer_separability, tf_idf_score
from comparison.sqnr import decibels


def test_traces_of_a_quadratic_are_exact_where_it_is_diagonal() -> None:
    """Rademacher vectors give v . (D v) = tr(D) for a diagonal D without any variance."""
    a, b = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    d, e = torch.rand(5) + 0.5, torch.rand(3) - 0.5
    loss = 0.5 * (d * a * a).sum() + 0.5 * (e * b * b).sum()
    found = hutchinson(loss, {"a": a, "b": b}, 1, torch.Generator().manual_seed(0))
    assert found["a"].trace == pytest.approx(float(d.sum()), rel=1e-5)
    assert found["b"].trace == pytest.approx(float(e.sum()), rel=1e-5)
    assert found["a"].average == pytest.approx(float(d.mean()), rel=1e-5)


def test_traces_of_a_full_quadratic_come_near_with_many_probes() -> None:
    """Blocks of one coupled quadratic: the estimate of each block lies within some standard errors of its trace."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=generator)
    matrix = root @ root.T
    a, b = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    x = torch.cat([a, b])
    found = hutchinson(0.5 * x @ matrix @ x, {"a": a, "b": b}, 2000, generator)
    for name, block in (("a", matrix[:5, :5]), ("b", matrix[5:, 5:])):
        assert abs(found[name].trace - float(block.trace())) < 5 * found[name].standard_error
        assert found[name].standard_error < 0.1 * float(block.trace())


def linear_softmax() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4))
    return model.eval(), torch.randn(40, 6)


def test_trace_of_a_linear_softmax_layer_is_the_one_in_closed_form() -> None:
    """Cross-entropy of softmax(W x): tr = mean over samples of |x|^2 sum_k p_k (1 - p_k), whatever the labels."""
    model, x = linear_softmax()
    graph = optimize(capture(model, (x,)))
    layer = next(n.name for n in graph.nodes if n.op == "linear")
    p = F.softmax(model(x).detach(), dim=1)
    exact = float(((x**2).sum(dim=1) * (p * (1 - p)).sum(dim=1)).mean())
    labels = [np.arange(20) % 4, np.arange(20) % 3]
    for given_labels in (None, labels):
        found = layer_traces(graph, [layer], [[x[:20]], [x[20:]]], given_labels, probes=1500)[layer]
        assert found.weights == 24
        assert found.trace == pytest.approx(exact, rel=0.08)


def test_labels_that_do_not_fit_are_refused() -> None:
    model, x = linear_softmax()
    graph = optimize(capture(model, (x,)))
    layer = next(n.name for n in graph.nodes if n.op == "linear")
    for labels in ([np.zeros(3, np.int64)], [np.full(40, 4)], [np.full(40, -1)]):
        with pytest.raises(CalibrationError, match="labels of calibration batch 0 do not fit"):
            layer_traces(graph, [layer], [[x]], labels, probes=1)
    with pytest.raises(CalibrationError, match="0 probes"):
        hutchinson(torch.zeros(()), {}, 0, torch.Generator())


def test_separability_of_constructed_features() -> None:
    own = np.eye(10) * 3.0  # a channel for each class
    assert tf_idf_score(own) == pytest.approx(math.log(10))
    assert tf_idf_score(np.ones((10, 7))) == pytest.approx(0.0)
    assert tf_idf_score(np.zeros((4, 3))) == 0.0
    halves = np.repeat(np.eye(2), 5, axis=0)  # two channels, each shared by five classes
    assert tf_idf_score(halves) == pytest.approx(math.log(2))
    mixed = np.concatenate([own, np.full((10, 10), 0.5)], axis=1)  # channels that say nothing dilute the others
    assert 0.0 < tf_idf_score(mixed) < tf_idf_score(own)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
def test_separability_is_bounded_and_blind_to_scale_and_order(seed: int, n: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random((n, channels)) * (rng.random((n, channels)) < 0.7)
    score = tf_idf_score(x)
    assert -1e-12 <= score <= math.log(n) + 1e-9
    assert tf_idf_score(x[rng.permutation(n)][:, rng.permutation(channels)] * 8.0) == pytest.approx(score, abs=1e-9)


def test_class_means_and_errors(ground: Ground) -> None:
    x = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    assert class_means(x, np.array([4, 4, 1])).tolist() == [[0.0, 5.0], [2.0, 0.0]]
    with pytest.raises(CalibrationError, match="finite magnitudes"):
        tf_idf_score(np.array([[-1.0, 2.0]]))
    batches = ground.batches(16)
    with pytest.raises(CalibrationError, match="3 labels for 16"):
        layer_separability(ground.prepared.graph, ground.layers, batches, np.zeros(3, np.int64))
    own = layer_separability(ground.prepared.graph, ground.layers, batches)
    per_sample = layer_separability(ground.prepared.graph, ground.layers, batches, None, "samples")
    assert set(own) == set(per_sample) == set(ground.layers)
    assert all(0 <= v <= math.log(10) for v in own.values()) and all(0 <= v <= math.log(16) for v in per_sample.values())


def test_decibels() -> None:
    x = np.array([[3.0, 4.0]])
    assert decibels(x, x + [[0.3, 0.4]]) == pytest.approx(20.0)
    assert decibels(x, x) == math.inf
    assert decibels(np.zeros(2), np.ones(2)) == -math.inf
