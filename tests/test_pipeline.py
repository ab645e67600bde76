"""Properties of the whole preparation: the layout changes no bit of a conv net, and stages keep their promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.pipeline import prepare, quantize_prepared, search_context
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.weights import read_back_weights
from bitdial.zoo.registry import build_model

QUICK = QuantizeConfig(target="paper", selector="greedy", calibration_images=16, search_images=8, batch_size=8)


IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def random_resnet20() -> nn.Module:
    torch.manual_seed(1)
    model = build_model("zoo:resnet20")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.running_mean.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Captured once: capture costs more than all the rest."""
    return capture(random_resnet20(), (IMAGES,))


def test_the_8_bit_model_is_the_same_to_the_bit_with_and_without_sorted_channels(graph: Graph) -> None:
    x = IMAGES
    config = QUICK.updated(bias_correction=False, low_weights="derived", ratios=(0.0, 1.0))
    outputs = []
    for sort in (True, False):
        own = config.updated(sort_channels=sort)
        prepared = prepare(graph, [x], own)
        assert (prepared.layout is not None) == sort
        outputs.append(ReferenceEngine(quantize_prepared(prepared, own)).run(x, 0.0))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[0].std() > 0.01


def test_sorting_reports_no_reorders_and_sorted_groups(graph: Graph) -> None:
    prepared = prepare(graph, [IMAGES], QUICK)
    assert prepared.layout is not None and prepared.layout.n_reorders == 0
    program = quantize_prepared(prepared, QUICK)
    assert len(program.provenance["layout"]["reorders"]) == 0
    assert program.nested


def test_batches_of_samples_are_no_copies(graph: Graph) -> None:
    """Every step keeps its own list of them, while memory is at its peak."""
    prepared = prepare(graph, [IMAGES], QUICK)
    batches = prepared.batches(6, limit=13)
    assert [len(batch[0]) for batch in batches] == [6, 6, 1]
    assert all(x.untyped_storage().data_ptr() == IMAGES.untyped_storage().data_ptr() for (x,) in batches)
    assert torch.equal(torch.cat([x for (x,) in batches]), IMAGES[:13])


def test_every_ratio_is_met_to_within_half_a_group(graph: Graph) -> None:
    config = QUICK.updated(ratios=(0.1, 0.33, 0.5, 0.9, 1.0), selector="random")
    program = quantize_prepared(prepare(graph, [IMAGES], config), config)
    eligible = [layer for layer in program.layers.values() if layer.eligible]
    total = sum(int(layer.group_macs.sum()) for layer in eligible)
    half = max(int(layer.group_macs.max()) for layer in eligible) / 2
    for index, ratio in enumerate(program.ratios):
        assert abs(program.eligible_share(index) - ratio) * total <= half + 1e-6


def test_bias_table_restores_the_means_of_the_float_outputs(graph: Graph) -> None:
    """The last layer's mean output on the calibration samples equals the float model's, at every ratio."""
    x = IMAGES
    expected = run_graph(graph, [x])[0].mean(dim=0)
    for corrected in (True, False):
        config = QUICK.updated(bias_correction=corrected)
        engine = ReferenceEngine(quantize_prepared(prepare(graph, [x], config), config))
        worst = max(float((engine.run(x, r).mean(dim=0) - expected).abs().max()) for r in engine.ratios)
        scale = float(expected.abs().max())
        if corrected:
            assert worst < 1e-3 * scale
        else:
            assert worst > 1e-2 * scale


def test_search_context_tells_models_and_data_apart(graph: Graph) -> None:
    x = IMAGES[:8]
    program = quantize_prepared(prepare(graph, [x], QUICK), QUICK)
    first = search_context(program, [x], 8)
    assert first == search_context(program, [x.clone()], 8)
    assert first != search_context(program, [x + 1e-3], 8)
    layer = next(layer for layer in program.layers.values() if layer.eligible)
    layer.activation_shift = (layer.activation_shift ^ 1).astype(np.uint8)
    assert first != search_context(program, [x], 8)


@pytest.mark.parametrize("bits", [2, 7, *(pytest.param(b, marks=pytest.mark.slow) for b in (3, 6))])
def test_any_low_width_runs_and_wider_is_nearer(bits: int, graph: Graph) -> None:
    x = IMAGES
    config = QUICK.updated(low_bits=bits, ratios=(0.0, 1.0))
    program = quantize_prepared(prepare(graph, [x], config), config)
    layer = next(layer for layer in program.layers.values() if layer.eligible)
    assert layer.wmax == 2 ** (bits - 1) - 1 and layer.amax == 2**bits - 1
    engine = ReferenceEngine(program)
    error = float((engine.run(x, 1.0) - engine.run(x, 0.0)).pow(2).mean().sqrt())
    signal = float(engine.run(x, 0.0).std())
    assert error / signal < {2: 10.0, 3: 2.0, 6: 0.1, 7: 0.05}[bits]


def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_layers(graph: Graph) -> None:
    with pytest.raises(ConfigError, match=r"keep_8bit pattern 'layer9\.\*' matches nothing.*layer1"):
        prepare(graph, [IMAGES], QUICK.updated(keep_8bit=("layer9.*",)))


def test_the_stated_bound_holds_for_every_choice_of_low_groups(graph: Graph) -> None:
    program = quantize_prepared(prepare(graph, [IMAGES], QUICK), QUICK)
    for layer in program.layers.values():
        if not layer.eligible:
            continue
        assert layer.weight is not None
        low = read_back_weights(layer)
        activation = program.qparams[program.graph.node(layer.name).inputs[0]]
        for weight in (layer.weight, low):
            rows = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1)
            assert rows.max() * activation.qmax <= layer.accumulator_bound


class Features(nn.Module):
    """Gives its feature map as well, which its own head reads on: layout puts a reorder before that output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.conv(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3))), x


def test_an_output_that_is_read_on_may_be_reordered() -> None:
    torch.manual_seed(3)
    model, x = Features().eval(), torch.randn(8, 3, 8, 8)
    program = quantize_prepared(
        prepare(model, [x], QUICK.updated(lower_first_last=True)), QUICK.updated(lower_first_last=True)
    )
    wanted, found = model(x), ReferenceEngine(program).run(x, 0.0)
    assert len(found) == 2
    for a, b in zip(wanted, found, strict=True):
        assert float((a - b).norm() / a.norm()) < 0.03


class Stacked(nn.Module):
    """Vectors of several branches as channels of a 1-D convolution, which works along what is sorted (CoaT's class tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(12, 16) for _ in range(3))
        self.mixed, self.head, self.other = nn.Conv1d(3, 1, 1), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.tanh(branch(x)) for branch in self.branches]
        out: Tensor = self.head(self.mixed(torch.stack(parts, dim=1)).squeeze(1)) + self.other(parts[0] + parts[1] + parts[2])
        return out


def test_channels_of_a_reader_need_not_be_the_axis_that_is_sorted(helpers: Any) -> None:
    torch.manual_seed(0)
    model, x = Stacked().eval(), torch.randn(32, 12)
    config = QuantizeConfig(selector="greedy", group_size=4, lower_first_last=True)
    program = quantize_prepared(prepare(model, [x], config), config)
    with torch.no_grad():
        exact = model(x)
    assert helpers.snr(exact, ReferenceEngine(program).run(x, 0.0)) > 25.0
