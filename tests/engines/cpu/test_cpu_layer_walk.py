"""A program run layer by layer while its numbers change: the reference engine's values, to the bit, in compiled kernels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cpu_networks import NETWORKS, Network, quantized, samples, with_low_plane
from transformer_networks import NETWORKS as TRANSFORMERS
from transformer_networks import transformer as transformer_network

from bitdial.engines.cpu import native
from bitdial.engines.cpu.layer_walk import LayerWalk
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.engines.reference.walk import TorchWalk
from bitdial.errors import EngineError
from bitdial.pipeline import prepare, quantize_prepared, quantizing
from bitdial.pipeline.walks import CompiledWalk, walk_of
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program

ISAS = native.isas() if not native.missing() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled extension is not built")


def same_walks(program: Program, batches: list[list[torch.Tensor]]) -> None:
    """Both walks meet the same bytes at every layer and ratio, though every layer changes right before it runs."""
    program = copy.deepcopy(program)  # others test with it too
    rng = np.random.default_rng(0)
    compiled, exact = CompiledWalk(program), TorchWalk(program, Executor(program))
    for index in range(len(program.ratios)):
        both = zip(compiled.layers(index, batches), exact.layers(index, batches), strict=True)
        with torch.no_grad():
            for number, (step, other) in enumerate(both):
                assert step is other
                for x, y in zip(compiled.stored(step), exact.stored(step), strict=True):
                    assert x.dtype == y.dtype and torch.equal(x, y), f"{step.name}, ratio {program.ratios[index]}"
                layer = step.layer
                room = max(1, int(np.abs(layer.bias).max()) // 8)
                layer.bias[index] += rng.integers(-room, room + 1, layer.bias.shape[1])
                if layer.low_weight is not None and number % 2:
                    layer.low_weight = rng.integers(-layer.wmax, layer.wmax + 1, layer.low_weight.shape).astype(np.int8)
                if number % 3:
                    shifts = rng.integers(0, naive_shift(True, layer.wmax) + 1, layer.weight_shift.shape)
                    layer.weight_shift = shifts.astype(np.uint8)
                exact.renew(step)
                compiled.renew(step)
        for x, y in zip(compiled.outputs(), exact.outputs(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_convolutional_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them with low weights of their own; the instruction sets take turns."""
    number = sorted(NETWORKS).index(name)
    monkeypatch.setenv(native.ISA_VARIABLE, ISAS[number % len(ISAS)])
    program = quantized(NETWORKS[name]())
    if number // len(ISAS) % 2 == 0:
        program = with_low_plane(program)
    x = torch.from_numpy(samples(program.graph, 5))
    try:
        LayerWalk(program)
    except EngineError:
        assert isinstance(walk_of(program), TorchWalk)
        return
    same_walks(program, [[x[:3]], [x[3:]]])


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_transformers(name: str) -> None:
    program, inputs = transformer_network(name)
    x = [torch.from_numpy(np.array(a)) for a in inputs]
    same_walks(program, [[a[:3] for a in x], [a[3:5] for a in x]])


class ExactSums(FastExecutor):
    """As the bias table's executor, with exact sums."""

    exact = True

    def products(self, step: Contract, x: torch.Tensor, setting: Setting) -> torch.Tensor:
        return Executor.products(self, step, x.float(), setting)


@pytest.mark.parametrize("kind", ["convolutional", "transformer"])
@pytest.mark.parametrize("extraction", ["static", "dynamic"])
def test_quantizing_by_either_walk(kind: str, extraction: Any, conv_net: Any, transformer: Any, helpers: Any,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """What comes of it is the same program: bias rows, low weights and shifts."""
    model = conv_net if kind == "convolutional" else transformer
    config = QuantizeConfig(
        target="paper", group_size=8, calibration_images=20, batch_size=8, selector="greedy", extraction=extraction
    )  # fmt: skip
    found = []
    for walk in (CompiledWalk, lambda program: TorchWalk(program, ExactSums(program))):
        monkeypatch.setattr(quantizing, "walk_of", walk)
        found.append(quantize_prepared(prepare(model, [helpers.images(20, seed=9)], config), config).layers)
    for name in found[0]:
        for part in ("bias", "low_weight", "weight_shift", "activation_shift", "low"):
            one, other = (getattr(own[name], part) for own in found)
            assert (one is None and other is None) or np.array_equal(one, other), f"{name}: {part}"


def test_what_does_not_compile_runs_in_torch() -> None:
    network = Network(3, 8, 8)
    x = network.conv("x", 8)
    x = network.elsewhere(x)
    network.graph.outputs = [network.conv(x, 8)]
    program = quantized(network.graph)
    with pytest.raises(EngineError, match="does not compile whole"):
        LayerWalk(program)
    assert isinstance(walk_of(program), TorchWalk)


def test_arrays_that_do_not_fit() -> None:
    program = quantized(NETWORKS[sorted(NETWORKS)[0]]())
    walk: Any = LayerWalk(program)
    with pytest.raises(ValueError, match="do not fit"):
        walk.native.renew(next(iter(walk._places.values())), np.zeros((len(program.ratios), 1), np.int32), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="no such step"):
        walk.native.renew(10_000, np.zeros((1, 1), np.int32), np.zeros(1, np.uint8))
    others = [i for i, (_, kind) in enumerate(walk.native.steps()) if kind not in ("conv", "depthwise")]
    with pytest.raises(ValueError, match="not one layer"):
        walk.native.renew(others[0], np.zeros((1, 1), np.int32), np.zeros(1, np.uint8))
