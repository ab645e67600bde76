"""Uniform low layers as programs, against a fake-quantized evaluation in float that shares no code with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdial.artifact import load_program, save_program
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError
from bitdial.graph.interpreter import constant_tensors, evaluate_node
from bitdial.quantization.calibration import TensorStatistics
from bitdial.quantization.program import Program
from comparison import Ground, average_bits
from comparison.uniform import (
    compensated_rounding,
    least_squares_top,
    least_squares_weight_scale,
    uniform_program,
)


def fake(x: Tensor, scale: float | Tensor, low: int, high: int) -> Tensor:
    return torch.clamp(torch.round(x / scale), low, high) * scale


def fake_quantized(ground: Ground, program: Program, bits: int, x: Tensor) -> Tensor:
    """The float graph in float64 with uniform quantization written in: layers at `bits`, or 8 where not eligible."""
    graph = ground.prepared.graph
    values = {k: v.double() for k, v in constant_tensors(graph).items()}
    values[graph.inputs[0]] = x.double()

    def eight(name: str, value: Tensor) -> Tensor:
        q = program.qparams.get(name)
        return value if q is None else fake(value, q.scale, -127 if q.signed else 0, 127 if q.signed else 255)

    for node in graph.nodes:
        operands = [values[v] for v in node.operands()]
        if node.op in ("conv", "linear"):
            layer = program.layers[node.name]
            assert node.weight is not None
            eight_name = node.inputs[0] if node.inputs[0] in program.qparams else f"{node.inputs[0]}_q8"
            operands[0] = eight(eight_name, operands[0])
            weight = values[node.weight]
            rows = weight.flatten(1)
            if layer.eligible:
                signed = program.qparams[eight_name].signed
                top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
                reach = least_squares_top(ground.prepared.statistics[node.inputs[0]], top)
                operands[0] = fake(operands[0], float(np.float32(reach / top)), -top if signed else 0, top)
                wmax = 2 ** (bits - 1) - 1
                scale = torch.from_numpy(least_squares_weight_scale(weight.float().numpy(), wmax))
            else:
                wmax, scale = 127, rows.abs().amax(dim=1) / 127
            shape = (-1, *[1] * (weight.dim() - 1))
            operands[1] = fake(weight, scale.float().double().reshape(shape), -wmax, wmax)
            unit = layer.weight_scale.astype(np.float64) * program.qparams[program.graph.node(node.name).inputs[0]].scale
            bias = torch.from_numpy(layer.bias[0] * unit)  # the corrected bias, in real units
            position = 2
            if node.bias is not None:
                operands[position] = bias
                result = evaluate_node(node, operands, len(x))
            else:
                attrs = {k: v for k, v in node.attrs.items() if k != "activation"}
                bare = type(node)(node.name, node.op, node.inputs, attrs, node.weight)
                result = evaluate_node(bare, operands[:2], len(x)) + bias.reshape(
                    [1, -1, *[1] * (weight.dim() - 2)] if node.op == "conv" else [-1]
                )
                assert node.residual is None and "activation" not in node.attrs
        else:
            result = evaluate_node(node, operands, len(x))
        values[node.name] = eight(node.name, result)
    return values[graph.outputs[0]]


@pytest.mark.parametrize("bits", [4, 6])
def test_uniform_is_what_fake_quantization_gives(ground: Ground, bits: int) -> None:
    x = ground.prepared.inputs[0]
    program = uniform_program(ground.prepared, ground.config, ground.full_masks(), bits)
    assert average_bits(program) == bits and program.ratios == [1.0]
    exact = ReferenceEngine(program).run(x).double()
    other = fake_quantized(ground, program, bits, x)
    # Rounding ties of float32 and float64 part here and there, and a step of a late layer shows in the outputs.
    assert float((exact - other).abs().mean()) < 0.01 * float(exact.std())
    eight = ReferenceEngine(ground.eight).run(x).double()
    if bits == 4:
        assert float((exact - other).abs().mean()) < 0.2 * float((exact - eight).abs().mean())


def test_low_integers_and_tables_stay_in_their_range(ground: Ground) -> None:
    program = uniform_program(ground.prepared, ground.config, ground.full_masks(), 4)
    for name in ground.layers:
        layer = program.layers[name]
        assert layer.weight is not None
        assert np.abs(layer.weight).max() == 7 and layer.low.all()
        source = program.graph.node(name).inputs[0]
        assert int(program.instruction(source).table.max()) == layer.amax and not layer.activation_shift.any()


def test_a_layer_in_part_lies_between_and_survives_a_file(ground: Ground, tmp_path: Path) -> None:
    """Half of a layer low: nearer to 8 bits than the whole layer, and the same from a file."""
    name = max(ground.layers, key=lambda n: ground.eight.layers[n].n_groups)
    full = ground.full_masks()[name]
    half = np.arange(len(full)) < len(full) // 2
    x = ground.prepared.inputs[0]
    eight = ReferenceEngine(ground.eight).run(x)
    errors = {}
    for label, mask in (("half", half), ("full", full)):
        program = uniform_program(ground.prepared, ground.config, {name: mask}, 4)
        assert 4.0 < average_bits(program) < 8.0
        save_program(program, tmp_path / "x.bitdial")
        again = load_program(tmp_path / "x.bitdial")
        y = ReferenceEngine(program).run(x)
        assert torch.equal(y, ReferenceEngine(again).run(x))
        errors[label] = float((y - eight).pow(2).mean())
    assert 0 < errors["half"] < errors["full"]


def test_compensated_rounding_errs_less_in_outputs(ground: Ground) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 30)).astype(np.float32)
    inputs = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 30)) + 0.1 * rng.normal(size=(500, 30))  # correlated
    scale = least_squares_weight_scale(weight, 7)
    found = compensated_rounding(weight, scale, 7, inputs)
    nearest = np.clip(np.rint(weight / scale[:, None]), -7, 7)
    assert np.abs(found).max() <= 7
    error = [np.square(inputs @ (q * scale[:, None] - weight).T).sum() for q in (found, nearest)]
    assert error[0] < 0.7 * error[1]
    x = ground.prepared.inputs[0]
    reference = ReferenceEngine(ground.eight).run(x)
    name = ground.layers[0]
    masks = {name: ground.full_masks()[name]}
    rounded = [
        ReferenceEngine(uniform_program(ground.prepared, ground.config, masks, 4, how)).run(x)
        for how in ("nearest", "compensated")  # type: ignore[arg-type]
    ]
    assert float((rounded[1] - reference).pow(2).mean()) < float((rounded[0] - reference).pow(2).mean())


def test_ranges_of_least_squared_error() -> None:
    """Against a finer search on the values themselves; zeros cost nothing."""
    rng = np.random.default_rng(1)
    values = np.concatenate([np.zeros(5000), np.abs(rng.normal(size=5000))])
    statistics = TensorStatistics()
    statistics.update(torch.from_numpy(values), "x")

    def error(top: float) -> float:
        step = top / 15
        return float(np.square(np.clip(np.rint(values / step), 0, 15) * step - values).sum())

    best = min(error(t) for t in np.linspace(0.1, 1.0, 400) * values.max())
    assert error(least_squares_top(statistics, 15)) < 1.05 * best
    assert least_squares_top(TensorStatistics(), 15) == 0.0


def test_layers_that_may_not_run_low_are_refused(ground: Ground) -> None:
    first = next(n for n, layer in ground.eight.layers.items() if not layer.eligible)
    groups = ground.eight.layers[first].n_groups
    with pytest.raises(ConfigError, match="may not run low: first layer"):
        uniform_program(ground.prepared, ground.config, {first: np.ones(groups, np.bool_)}, 4)
    with pytest.raises(ConfigError, match="there is none of that name"):
        uniform_program(ground.prepared, ground.config, {"nothing": np.ones(1, np.bool_)}, 4)
    with pytest.raises(ConfigError, match="at 8 bits: choose 2 to 7"):
        uniform_program(ground.prepared, ground.config, ground.full_masks(), 8)
