"""Layers of a quantized network, from the file on, through the simulated unit: the reference engine's accumulators."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npu_cases import SMALL

from bitdial.artifact import load_program, save_program
from bitdial.engines.base import create_engine
from bitdial.engines.npu.cycles import layer_cycles
from bitdial.engines.npu.engine import NpuEngine, accumulators
from bitdial.engines.npu.images import activation_image, place_sums, shift_image, weight_image
from bitdial.engines.npu.lowering import lower
from bitdial.engines.npu.program import job_instructions
from bitdial.engines.npu.words import encode
from bitdial.quantization.program import Program
from bitdial.quantization.weights import low_integers

sys.path[:0] = [str(Path(__file__).parent.parent / "engines" / "cpu")]
import cpu_networks as nets  # noqa: E402


def simulate_layer(simulated: Any, engine: NpuEngine, name: str, x: np.ndarray, ratio: int) -> tuple[np.ndarray, int]:
    """(sums [O, h, w], cycles) of one sample."""
    program, plan, design = engine.program, engine.lowered.plans[name], engine.machine.design
    layer, step = program.layers[name], program.instruction(name)
    g = plan.geometry
    image = x if layer.kind == "conv" else x.reshape(-1, x.shape[-1]).T[:, :, None]
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)
    low = low_integers(layer).reshape(weight.shape)
    sums, cycles = np.zeros((g.outputs, *g.out_size), np.int32), 0
    for i, job in enumerate(plan.jobs):
        # every run starts from reset here, so that LOW is written each time; its two cycles are of the test
        words = encode(job_instructions(plan, job, program.qparams[step.inputs[0]].signed, plan.low[ratio]))
        done = simulated.run(
            words, activation_image(plan, job, image, design), weight_image(plan, job, weight, low, design),
            shift_image(job, layer.weight_shift, design), plan.pixels(job) * (job.tiles[1] - job.tiles[0]),
        )  # fmt: skip
        assert done.status == 2
        cycles += done.cycles - (2 if i else 0)
        place_sums(plan, job, done.sums, sums, design)
    return sums, cycles


def on_small(program: Program) -> NpuEngine:
    made = create_engine(program, "npu", rows=4, columns=4)
    assert isinstance(made, NpuEngine)
    made.machine = dataclasses.replace(made.machine, design=SMALL)
    made.lowered = lower(program, SMALL)
    return made


def check(simulated: Any, engine: NpuEngine, most_cycles: float) -> int:
    """All ratios and layers that take no more cycles; how many runs that were."""
    x, runs = nets.samples(engine.program.graph, 1), 0
    for index, ratio in enumerate(engine.ratios):
        for name, (read, expected) in accumulators(engine, x, ratio).items():
            plan = engine.lowered.plans[name]
            modelled = layer_cycles(plan, SMALL, plan.low[index])
            if modelled > most_cycles:
                continue
            sums, cycles = simulate_layer(simulated, engine, name, read[0], index)
            want = expected[0] if expected.ndim == 4 else expected[0].reshape(-1, expected.shape[-1]).T[:, :, None]
            np.testing.assert_array_equal(sums, want, err_msg=f"{name} at {ratio}")
            assert cycles == modelled
            runs += 1
    return runs


def test_layers_of_a_file_give_the_reference_engines_accumulators(small: Any, tmp_path: Path) -> None:
    """Every ratio; convolutions and linear layers, mixed and ragged. The longer layers: below."""
    save_program(nets.quantized(nets.mobile_net()), tmp_path / "net.bitdial")
    assert check(small, on_small(load_program(tmp_path / "net.bitdial")), 600) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("network", [nets.mobile_net, nets.residual_net])
def test_all_layers_of_networks(small: Any, network: Any) -> None:
    engine = on_small(nets.quantized(network()))
    assert check(small, engine, np.inf) == len(engine.lowered.plans) * len(engine.ratios)
