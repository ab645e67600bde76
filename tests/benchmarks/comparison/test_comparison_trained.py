"""Methods that change weights: the penalty and its gradient, shared widths, blocks, and a step or two of each method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError, DataError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import SampledBatches
from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from bitdial.pipeline import Prepared, prepare
from bitdial.quantization.config import QuantizeConfig
from comparison import Ground, Settings, Training, build_all
from comparison.any_precision import soft_cross_entropy
from comparison.kurtosis import kurtosis, kurtosis_penalty
from comparison.ptmq import blocks_of, group_loss, reconstruct
from comparison.training import train_float
from comparison.widths import SharedWidths

FINETUNE = FinetuneConfig(epochs=1, batch_size=16, precision="float32", device="cpu", rederivations=0)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.layer(a) + self.layer(b)
        return y


@pytest.fixture(scope="module")
def training(digits_data: tuple[torch.Tensor, torch.Tensor]) -> Training:
    images, labels = digits_data[0][:32], digits_data[1][:32]
    return Training(FINETUNE, SampledBatches(32, lambda at: (images[at], labels[at]), 16))


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([(40,), (4, 9), (3, 2, 3, 3)]))
def test_the_penalty_has_the_gradient_of_its_differences(seed: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).requires_grad_(True)
    kurtosis_penalty({"w": weight}).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    direction = torch.randn(shape, generator=generator)
    h = 1e-2
    with torch.no_grad():
        ahead, behind = (float(kurtosis_penalty({"w": weight + s * h * direction})) for s in (1, -1))
    expected = float((weight.grad * direction).sum())
    assert (ahead - behind) / (2 * h) == pytest.approx(expected, rel=0.1, abs=0.05 * (1 + abs(expected)))


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(kurtosis(torch.rand(200_000, generator=generator))) == pytest.approx(1.8, abs=0.02)
    assert float(kurtosis(torch.randn(200_000, generator=generator))) == pytest.approx(3.0, abs=0.1)
    rows = torch.rand(4, 50_000, generator=generator) - 0.5
    scaled = rows * torch.tensor([[1.0], [10.0], [0.1], [3.0]])  # scales of channels do not matter
    assert float(kurtosis(scaled)) == pytest.approx(float(kurtosis(rows)), abs=1e-3)
    assert float(kurtosis_penalty({})) == 0.0


def test_training_moves_kurtosis_towards_the_target(prepared: Prepared, ground: Ground, training: Training) -> None:
    source = prepared.graph.copy()
    names = {v for n in ground.layers if (v := source.node(n).weight) is not None}
    rng = np.random.default_rng(0)
    for name in names:  # fresh weights are uniform; trained ones are nearer to this
        source.constants[name] = rng.normal(size=source.constants[name].shape).astype(np.float32) * 0.05

    def mean_distance(graph) -> float:  # type: ignore[no-untyped-def]
        return float(np.mean([abs(float(kurtosis(torch.from_numpy(graph.constants[n]))) - 1.8) for n in names]))

    config = FINETUNE.updated(learning_rate=3e-3)
    fast = Training(config, training.batches)
    graph, figures = train_float(source, fast, lambda w: kurtosis_penalty({n: x for n, x in w.items() if n in names}))
    assert figures["updates"] == 2
    assert mean_distance(graph) < mean_distance(source)
    again, _ = train_float(source, fast, lambda w: kurtosis_penalty({n: x for n, x in w.items() if n in names}))
    assert all(np.array_equal(graph.constants[n], again.constants[n]) for n in graph.constants)


def test_widths_share_weights_and_export_what_they_compute(ground: Ground) -> None:
    shared = SharedWidths(ground, (4, 8), normalize=True)
    assert shared.widths == [8, 4]
    first, second = shared.network(8), shared.network(4)
    assert all(first.weights[k] is second.weights[k] for k in first.weights)
    assert all(first.norms[k] is not second.norms[k] for k in first.norms) and len(first.norms) > 0
    x = ground.prepared.inputs[0][:8]
    with torch.no_grad():
        for network in (first, second):
            for parameter in network.parameters():
                if parameter.requires_grad and parameter.dim() == 1:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for bits in (8, 4):
            program = shared.export(bits)
            twin, exact = shared.logits([x], bits), ReferenceEngine(program).run(x)
            # Equal but for ties of rounding, which float32 and the exact engine may break differently.
            assert float((twin - exact).abs().mean()) < 0.06 * float(exact.std())
    top = shared.export(4)
    for name in ground.layers:
        assert (top.layers[name].weight_shift == 4).all() and not top.layers[name].activation_shift.any()
    with pytest.raises(ConfigError, match=r"widths \[1, 8\]"):
        SharedWidths(ground, (1, 8), normalize=False)


def test_blocks_end_where_one_value_is_alive(ground: Ground) -> None:
    graph = ground.prepared.graph
    blocks = blocks_of(graph, ground.layers)
    assert [n for block in blocks for n in block.nodes] == [node.name for node in graph.nodes]
    assert blocks[0].inputs == graph.inputs[0] and blocks[-1].output == graph.outputs[0]
    assert all(a.output == b.inputs for a, b in zip(blocks, blocks[1:], strict=False))
    assert len(blocks) == 3  # a residual block each
    for block in blocks:
        inside = set(block.nodes) | {block.inputs}
        for name in block.nodes:
            assert all(v in inside or v in graph.constants for v in graph.node(name).operands())
    two = optimize(capture(TwoInputs(), (torch.randn(2, 3), torch.randn(2, 3))))
    with pytest.raises(ConfigError, match="one input and one output"):
        blocks_of(two, [])


def test_reconstruction_lowers_its_loss_and_is_the_same_for_a_seed(ground: Ground) -> None:
    found = []
    for _ in range(2):
        shared = SharedWidths(ground, (4, 8), normalize=False)
        figures = reconstruct(shared, ground.prepared.inputs[0], iterations=12, batch_size=8, rate=0.002, seed=0)
        found.append((figures, shared.network(8).state_dict()))
    assert found[0][0]["last_loss"] < found[0][0]["first_loss"]
    assert all(torch.equal(found[0][1][k], found[1][1][k]) for k in found[0][1])
    f = [torch.full((2, 3), v) for v in (1.0, 2.0, 3.0, 4.0)]
    assert float(group_loss(*f)) == pytest.approx((2.0**2 + 1.0 + 4.0) / 1.0)


def test_soft_cross_entropy_is_least_at_the_teacher() -> None:
    teacher = torch.tensor([[1.0, -2.0, 0.5]])
    at = float(soft_cross_entropy(teacher, teacher))
    assert at == pytest.approx(float(torch.distributions.Categorical(logits=teacher).entropy()), abs=1e-6)
    assert all(float(soft_cross_entropy(teacher + d, teacher)) > at for d in (torch.randn(1, 3), torch.eye(3)[:1]))


@pytest.mark.parametrize("name", ["robust", "any_precision", "bitdial_finetuned", "ptmq"])
def test_every_method_trains_for_a_moment(name: str, prepared: Prepared, ground: Ground, training: Training) -> None:
    own = Ground(prepared, ground.config, training=training)
    built = build_all(name, own, (4, 8), Settings(iterations=2, reconstruction_batch=8))
    assert [round(p.reached, 6) for p in built.points] == [4.0, 8.0]
    x = prepared.inputs[0]
    for point in built.points:
        y = ReferenceEngine(point.program).run(x, point.ratio)
        assert bool(torch.isfinite(y).all()) and float(y.std()) > 0
    assert built.switching.in_time == (name != "robust") and built.seconds > 0


def test_training_data_are_asked_for(ground: Ground, prepared: Prepared, training: Training) -> None:
    with pytest.raises(ConfigError, match="'robust' trains: give Ground"):
        build_all("robust", ground, (4,))
    broken = SampledBatches(16, lambda at: (torch.full((len(at), 1, 8, 8), float("nan")), torch.zeros(len(at)).long()), 16)
    with pytest.raises(DataError, match="not finite at update 0"):
        train_float(prepared.graph, Training(FINETUNE.updated(distillation=0.0), broken))
    wrong = SampledBatches(16, lambda at: (prepared.inputs[0][at], torch.full((len(at),), 10)), 16)
    with pytest.raises(DataError, match="tells 10 classes apart"):
        train_float(prepared.graph, Training(FINETUNE, wrong))


@pytest.mark.slow  # training a transformer at every width takes some ten seconds
def test_transformers_too(transformer: nn.Module, helpers: Any) -> None:
    """Signed inputs, linear layers and LayerNorm: uniform layers in part, shared widths, blocks and both kinds of training."""
    images = helpers.images(8)
    config = QuantizeConfig(target="paper", selector="greedy", calibration_images=8, search_images=8, batch_size=8)
    batches = SampledBatches(8, lambda at: (images[at], at % 10), 8)
    own = Ground(prepare(transformer, [images], config), config, training=Training(FINETUNE, batches))
    reference = ReferenceEngine(own.eight).run(images)
    for name in ("uniform", "hawq", "ptmq", "robust", "any_precision"):
        built = build_all(name, own, (5, 8), Settings(iterations=1, reconstruction_batch=8, images=8, probes=1))
        for point in built.points:
            y = ReferenceEngine(point.program).run(images, point.ratio)
            assert float((y - reference).pow(2).mean()) < 0.3 * float(reference.var())
        assert len(blocks_of(own.prepared.graph, own.layers)) >= 3
