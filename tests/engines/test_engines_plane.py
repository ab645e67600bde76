"""Fitting the low plane on a network, and predicting what low groups do to its answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdial import QuantizeConfig
from bitdial.engines.reference.eight_bit_values import EightBitValues
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.engines.reference.influence import counting_rows
from bitdial.engines.reference.patches import patch_rows
from bitdial.engines.reference.plane_fit import SampledRows
from bitdial.engines.reference.prediction import TEMPERATURE, Prediction, _LayerError, predict, squares_of
from bitdial.engines.reference.search import CandidateEvaluator
from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from bitdial.pipeline import Prepared, eight_bit_program, low_tables, prepare, quantize_prepared
from bitdial.pipeline.quantizing import search_samples

CONFIG = QuantizeConfig(target="paper", group_size=8, calibration_images=24, batch_size=9, selector="greedy", ratios=(0.5, 1.0))


@pytest.mark.parametrize(
    ("dims", "stride", "padding", "dilation"), [(1, 2, 1, 1), (2, 1, 0, 1), (2, 2, 1, 1), (2, 1, 2, 2), (3, 2, 1, 1)]
)
def test_sampled_rows(dims: int, stride: int, padding: int, dilation: int) -> None:
    """A row times the weight is the convolution's output somewhere; all rows together are all outputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *[7, 6, 5][:dims], generator=generator)
    weight = torch.randn(5, 4, *[3, 2, 3][:dims], generator=generator)
    attrs = {"stride": [stride] * dims, "padding": [padding] * dims, "dilation": [dilation] * dims}
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    expected = conv(x, weight, None, stride, padding, dilation).movedim(1, -1).reshape(-1, 5)
    layer: Any = SimpleNamespace(weight=weight.numpy(), kind="conv")
    rows = SampledRows(SimpleNamespace(attrs=attrs), layer, 10_000, 1)(x, 0)  # type: ignore[arg-type]
    assert rows.shape == (len(expected), weight[0].numel())
    got = rows @ weight.flatten(1).T
    torch.testing.assert_close(got[got[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=1e-4, atol=1e-4)
    few = SampledRows(SimpleNamespace(attrs=attrs), layer, 7, 1)  # type: ignore[arg-type]
    assert torch.equal(few(x, 2), few(x, 2)) and len(few(x, 2)) == 7
    assert not torch.equal(few(x, 2), few(x, 3))


def test_sampled_rows_of_a_linear_layer() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    layer: Any = SimpleNamespace(weight=np.zeros((2, 3), np.int8), kind="linear")
    rows = SampledRows(SimpleNamespace(attrs={}), layer, 100, 0)(x, 0)  # type: ignore[arg-type]
    assert torch.equal(rows[rows[:, 0].argsort()], x.reshape(-1, 3))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_last_rows_are_of_other_samples(kind: str) -> None:
    """What `ridge` judges by, the last quarter, is of samples that it does not fit."""
    sample = torch.arange(40.0)
    if kind == "linear":
        x, weight, attrs = sample[:, None, None].expand(40, 6, 3), np.zeros((2, 3, 1)), {}
    else:
        x, weight = sample[:, None, None, None].expand(40, 3, 5, 5), np.zeros((2, 3, 1, 1))
        attrs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    layer = SimpleNamespace(weight=weight, kind=kind)
    node = SimpleNamespace(attrs=attrs, op=kind)
    rows = SampledRows(node, layer, 120, 0)(x, 0)[:, 0]  # type: ignore[arg-type]
    patches = patch_rows(node, weight.shape, x, torch.Generator().manual_seed(0), 120)[:, 0, 0]  # type: ignore[arg-type]
    for own in (rows, patches):
        fitted, judged = ({float(number) for number in part} for part in (own[:90], own[90:]))
        assert len(own) == 120 and len(judged) > 3 and len(fitted & judged) <= 1


def test_stored_low_weights_err_less(conv_net: Any, transformer: Any, helpers: Any) -> None:
    """At ratio 1 the network with low weights of its own is nearer to the float one on images that it was not fitted to, and
    8-bit weights are the same."""
    x, unseen = helpers.images(24, seed=3), helpers.images(256, seed=9)
    for model in (conv_net, transformer):
        exact = model(unseen).detach()
        prepared = prepare(model, [x], CONFIG)
        programs = [quantize_prepared(prepared, CONFIG.updated(low_weights=kind)) for kind in ("stored", "derived")]
        stored, derived = (helpers.snr(exact, ReferenceEngine(p).run(unseen, 1.0)) for p in programs)
        assert stored > derived + 0.25
        for name, layer in programs[0].layers.items():
            other = programs[1].layers[name]
            assert layer.weight is None or (layer.weight == other.weight).all()
            assert (layer.low_weight is not None) == bool(layer.eligible and layer.n_groups)
            assert other.low_weight is None


def test_a_higher_ratio_changes_nothing_below_it(conv_net: Any, helpers: Any) -> None:
    """One plane serves all ratios: what is low at 50 % has the weights that it would have without a higher ratio."""
    x = helpers.images(24, seed=4)
    prepared = prepare(conv_net, [x], CONFIG)
    both, alone = (quantize_prepared(prepared, CONFIG.updated(ratios=ratios)) for ratios in ((0.5, 1.0), (0.5,)))
    assert torch.equal(ReferenceEngine(both).run(x, 0.5), ReferenceEngine(alone).run(x, 0.5))
    seen = False
    for name, layer in both.layers.items():
        if layer.low_weight is None:
            continue
        other = alone.layers[name]
        low = layer.low[1][layer.channel_groups()]
        assert (other.low[1] == layer.low[1]).all()
        per_group = layer.weight.shape[1]
        for own in range(layer.conv_groups):
            rows = slice(own * len(layer.weight) // layer.conv_groups, (own + 1) * len(layer.weight) // layer.conv_groups)
            mask = low[own * per_group : (own + 1) * per_group]
            assert (layer.low_weight[rows][:, mask] == other.low_weight[rows][:, mask]).all()
            seen = seen or bool(mask.any())
    assert seen


def test_eight_bit_values_are_bytes(conv_net: Any, helpers: Any) -> None:
    config = CONFIG
    program = eight_bit_program(prepare(conv_net, [helpers.images(4)], config), config)
    values = EightBitValues(program, {})
    name, q = next(iter(program.qparams.items()))
    values[name] = torch.tensor([float(q.qmin), 0.0, float(q.qmax)])
    assert dict.__getitem__(values, name).itemsize == 1
    assert values[name].dtype == torch.float32 and values[name].tolist() == [q.qmin, 0.0, q.qmax]
    values["other"] = torch.tensor([0.5])
    assert values["other"].item() == 0.5


class Regression(nn.Module):
    """Linear from the layers that may be low to the one output, so that first order is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.third = nn.Conv2d(24, 16, 1)
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        out: Tensor = self.last(self.third(x).mean(dim=(2, 3)))
        return out


@pytest.mark.parametrize("corrected", [True, False])
def test_prediction_is_exact_to_first_order(helpers: Any, corrected: bool) -> None:
    torch.manual_seed(5)
    x = helpers.images(40, seed=5)
    config = CONFIG.updated(calibration_images=40, bias_correction=corrected)
    prepared = prepare(Regression(), [x], config)
    program = eight_bit_program(prepared, config)
    tables = low_tables(prepared, program, config)
    layers = [n for n, layer in program.layers.items() if layer.eligible]
    assert len(layers) == 2
    prediction = predict(prepared.graph, program, layers, [x], tables.mean_shifts)
    exact = CandidateEvaluator(program, layers, [x], tables.mean_shifts)
    groups = prediction.squares.shape[1]
    masks = np.concatenate([np.zeros((1, groups), np.bool_), np.eye(groups, dtype=np.bool_)])
    predicted, measured = prediction(masks), exact(masks)
    assert predicted[0] == 0.0
    # what first order leaves out: the 8-bit values in between are rounded anew, and errors of inputs meet those of weights
    np.testing.assert_allclose(predicted[1:], measured[1:], rtol=0.45)
    assert np.corrcoef(predicted, measured)[0, 1] > 0.97
    np.testing.assert_allclose(prediction(masks[2:3], 10), prediction(masks, 10)[2:3], rtol=1e-5)
    several = np.random.default_rng(0).random((12, masks.shape[1])) < 0.5
    np.testing.assert_allclose(prediction(several) ** 2, several @ predicted[1:] ** 2)  # as of independent errors


@pytest.mark.parametrize(("size", "outputs"), [(6, 3), (2, 9)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_errors_along_a_gradient(size: int, outputs: int, kernel: int) -> None:
    """However the products are ordered (by which is fewer, positions or outputs), they are those with the input's gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, size, size, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, 5, kernel, kernel, generator=generator)
    y = F.conv2d(x, weight, None, 1, kernel // 2)
    gradient = torch.randn(y.shape, generator=generator)
    error = torch.randn(x.shape, generator=generator)
    (own,) = torch.autograd.grad(y, x, gradient)
    attrs = {"stride": [1, 1], "padding": [kernel // 2] * 2, "dilation": [1, 1], "groups": 1}
    layer: Any = SimpleNamespace(
        node=SimpleNamespace(attrs=attrs), layer=SimpleNamespace(kind="conv"), axis=1, step=torch.ones(5)
    )
    found = _LayerError._along(layer, gradient, weight, error, 2)
    torch.testing.assert_close(found, (own * error).sum(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_prediction_of_a_network_that_reads_indices(helpers: Any) -> None:
    """The gradient starts at the embedding, where the input has none."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 16), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()
    x = torch.randint(0, 11, (24, 4), generator=torch.Generator().manual_seed(1))
    config = CONFIG
    prepared = prepare(model, [x], config)
    program = eight_bit_program(prepared, config)
    tables = low_tables(prepared, program, config)
    layers = [n for n, layer in program.layers.items() if layer.eligible]
    prediction = predict(prepared.graph, program, layers, [x], tables.mean_shifts)
    assert prediction.squares.shape == (24, sum(program.layers[n].n_groups for n in layers))
    assert bool(prediction.squares.sum(axis=0).all())


def test_prediction_of_class_scores() -> None:
    """The divergence between shares of classes at a temperature, of scores that move linearly: written out in all classes."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(6, 5, generator=generator).double() * 8  # most are sure of their answer
    moves = torch.randn(6, 5, 4, generator=generator).double() * 4
    moves[:, 2:] = moves[:, 2:3]  # the rest moves as one
    scores[:, :2] += 20.0
    rest, away = scores[:, 2:].logsumexp(1, keepdim=True), moves[:, 2:3]
    squares = squares_of((moves[:, :2] - away).float().numpy(), (scores[:, :2] - rest).float().numpy())
    prediction, masks = Prediction(squares), np.eye(4, dtype=np.bool_)
    joined, shifts = torch.cat([scores[:, :2], rest], 1), torch.cat([moves[:, :2], away], 1)
    exact = torch.log_softmax(joined / TEMPERATURE, 1)
    for mask, predicted in zip(masks, prediction(masks), strict=True):
        moved = torch.log_softmax((joined + shifts @ torch.from_numpy(mask).double()) / TEMPERATURE, 1)
        assert predicted == pytest.approx(float((exact.exp() * (exact - moved)).sum(1).mean().sqrt()), rel=1e-4, abs=1e-6)


class Padded(nn.Module):
    """Means of words, places of index 0 left out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, indices: Tensor) -> Tensor:
        mask = (indices != 0).float()[:, :, None]
        return self.head((self.inner(self.words(indices)) * mask).sum(dim=1) / mask.sum(dim=1))


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    indices = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    graph = optimize(capture(Padded().eval(), [indices]))
    inner, head = (n.name for n in graph.nodes if n.op == "linear")
    assert counting_rows(graph, [inner, head], [[indices[:2]], [indices[2:]]]) == {inner: 6 / 12, head: 1.0}


def test_every_row_of_an_image_counts(conv_net: Any, helpers: Any) -> None:
    x = helpers.images(2, seed=1)
    graph = optimize(capture(conv_net, [x]))
    assert counting_rows(graph, [n.name for n in graph.nodes if n.weight], [[x]]) == {}


def test_rows_that_count_are_told_by_few_samples() -> None:
    """Of every fourth of 128 texts, over all of their places: half of them are padding in even texts and none in odd ones."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(9, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            mask = (ids != 0).float()[:, :, None]
            out: Tensor = (self.inner(self.embed(ids)) * mask).sum(dim=1)
            return out

    torch.manual_seed(0)
    ids = torch.randint(1, 9, (128, 6))
    ids[::2, 3:] = 0
    graph = capture(Padded().eval(), (ids[:2],))
    name = next(n.name for n in graph.nodes if n.op == "linear")
    seen = [Prepared(graph, {}, [x], None, len(x)).counting_rows(64) for x in (ids, ids[:40])]
    assert seen == [{name: 0.5}, {name: 0.75}]


def test_predictions_take_64_samples_at_most() -> None:
    graph = capture(nn.Linear(4, 2).eval(), (torch.zeros(2, 4),))
    prepared = [Prepared(graph, {}, [torch.zeros(n, 4)], None, n) for n in (100, 20)]
    assert [search_samples(p, CONFIG) for p in prepared] == [64, 20]
    assert search_samples(prepared[0], CONFIG.updated(search="exact")) == 100
