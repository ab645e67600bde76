"""Statistics of the 8-bit model, first-order mean shifts, the bias table, and the executor's small operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitdial import QuantizeConfig
from bitdial.benchmarking.saturation import count_saturation
from bitdial.engines.base import ratio_index
from bitdial.engines.reference.bias_table import correct_bias, live_bytes_per_sample
from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.statistics import collect, float_output_means, group_mean_shifts
from bitdial.engines.reference.walk import TorchWalk
from bitdial.errors import RatioError
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.pipeline import eight_bit_program, prepare
from bitdial.quantization.program import Program, QParams
from hand_built import program_of


@pytest.mark.parametrize("signed", [False, True])
def test_statistics_of_values(make_layer_program: Any, random_integers: Any, signed: bool) -> None:
    rng = np.random.default_rng(0)
    program = make_layer_program(rng, rng.integers(-127, 128, (4, 6, 3, 3)).astype(np.int8), (6, 5, 5), signed=signed)
    batches = [[torch.from_numpy(random_integers(rng, (n, 6, 5, 5), signed))] for n in (4, 4, 3)]
    values = collect(TorchWalk(program, Executor(program)), batches)
    found = (values[0] if isinstance(values, tuple) else values)["x_q8"]
    x = torch.cat([b[0] for b in batches]).numpy().astype(np.int64)
    channels = np.moveaxis(x, 1, 0).reshape(6, -1)
    expected = np.stack([np.bincount(c + (128 if signed else 0), minlength=256) for c in channels])
    assert (found.histogram == expected).all() and found.signed == signed
    np.testing.assert_allclose(found.mean, x.mean(axis=0))
    assert (found.channel_max == np.abs(channels).max(axis=1)).all()


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3", "strided"])
def test_mean_shift_of_a_group(make_layer_program: Any, random_integers: Any, kind: str) -> None:
    """Extracting one group lowers the mean accumulators by its row: exactly so without borders, nearly so with them."""
    rng = np.random.default_rng(1)
    kernel = {"linear": (), "1x1": (1, 1), "3x3": (3, 3), "strided": (3, 3)}[kind]
    weight = np.clip(np.rint(rng.normal(size=(6, 5, *kernel)) * 40), -127, 127).astype(np.int8)
    shape = (5,) if kind == "linear" else (5, 8, 8)
    options: dict[str, Any] = {"conv_groups": 2} if kind != "linear" else {}
    if kind != "linear":
        shape = (10, 8, 8)
    if kind in ("3x3", "strided"):
        options.update(padding=(1, 1), stride=(2, 2) if kind == "strided" else (1, 1))
    program = make_layer_program(rng, weight, shape, group_size=2, **options)
    layer, node = program.layers["layer"], program.graph.node("layer")
    x = torch.from_numpy(random_integers(rng, (40, *shape), False))
    executor = Executor(program)
    values = collect(TorchWalk(program, executor), [[x]])
    statistics = (values[0] if isinstance(values, tuple) else values)["x_q8"]
    rows = group_mean_shifts(node, layer, statistics)
    assert rows.shape == (layer.n_groups, 6)
    none = torch.zeros(layer.n_groups, dtype=torch.bool)
    bias = torch.zeros(6, dtype=torch.float64)

    def means(low: torch.Tensor) -> np.ndarray:
        setting = executor.layers["layer"].setting(low, bias)
        acc = executor.accumulators(executor.instructions["layer"], {"x_q8": x}, setting, 40).double()
        result: np.ndarray = acc.movedim(1, -1).reshape(-1, 6).mean(0).numpy() if acc.dim() > 2 else acc.mean(0).numpy()
        return result

    base = means(none)
    size = max(float(np.abs(rows).max()), 1.0)
    for g in range(layer.n_groups):
        low = none.clone()
        low[g] = True
        difference = base - means(low)
        tolerance = 1e-9 if kind in ("linear", "1x1") else 0.08
        assert np.abs(difference - rows[g]).max() <= tolerance * size
    np.testing.assert_allclose(
        base - means(~none), rows.sum(axis=0), atol=(1e-9 if kind in ("linear", "1x1") else 0.2) * size
    )


def test_float_output_means(conv_net: Any, transformer: Any, helpers: Any) -> None:
    """Equal to the means of the layers' own outputs, before residual and activation."""
    x = helpers.images(12, seed=4)
    for model in (conv_net, transformer):
        prepared = prepare(model, [x], QuantizeConfig(sort_channels=False))
        names = [n.name for n in prepared.graph.nodes if n.op in ("conv", "linear")]
        means = float_output_means(prepared.graph, names, [[x[:5]], [x[5:]]])
        graph = prepared.graph.copy()
        for node in graph.nodes:  # bare layers, so that the interpreter shows op(x) + bias
            if node.name in names:
                node.attrs.pop("activation", None)
        from bitdial.graph.interpreter import constant_tensors, evaluate_node, run_graph

        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            run_graph(prepared.graph, [x], observe=lambda n, v: seen.__setitem__(n, v))  # noqa: B023
            constants = constant_tensors(graph)
            for name in names:
                node = graph.node(name)
                bare = Node(node.name, node.op, node.inputs, node.attrs, node.weight, node.bias)
                y = evaluate_node(bare, [seen.get(v, constants.get(v)) for v in bare.operands()], 12)  # type: ignore
                y = y.movedim(1 if node.op == "conv" else -1, -1).reshape(-1, means[name].shape[0])
                np.testing.assert_allclose(means[name], y.double().mean(0).numpy(), rtol=1e-4, atol=1e-4)


def test_bias_table_restores_the_means_layer_by_layer(conv_net: Any, helpers: Any) -> None:
    x = helpers.images(40, seed=6)
    config = QuantizeConfig(target="paper", group_size=8, bias_correction=False)
    prepared = prepare(conv_net, [x], config)
    program = eight_bit_program(prepared, config)
    for layer in program.layers.values():
        if layer.eligible:
            layer.low[1:] = True
            layer.activation_shift[:], layer.weight_shift[:] = 4 if layer.amax == 15 else 3, 4
    names = list(program.layers)
    batches = prepared.batches(16)
    means = float_output_means(prepared.graph, names, batches)
    untouched = {n: layer.bias[[0, 2, 3, 4]].copy() for n, layer in program.layers.items()}
    correct_bias(program, batches, means, [1])
    for name, layer in program.layers.items():
        assert (layer.bias[[0, 2, 3, 4]] == untouched[name]).all() and layer.bias.dtype == np.int32
    executor = Executor(program)
    accumulators: dict[str, torch.Tensor] = {}

    class Watch(Executor):
        def accumulators(self, step: Any, values: Any, setting: Any, batch: int) -> torch.Tensor:
            accumulators[step.name] = super().accumulators(step, values, setting, batch).clone()
            return accumulators[step.name].clone()

    Watch(program).run([x], executor.settings(1))
    for name, layer in program.layers.items():
        acc = accumulators[name].double().movedim(1, -1).reshape(-1, layer.bias.shape[1]).mean(0).numpy()
        unit = layer.weight_scale.astype(np.float64) * program.qparams[program.graph.node(name).inputs[0]].scale
        assert (np.abs((acc + layer.bias[1]) * unit - means[name]) <= unit * 0.51).all(), name


def eight_bit_graph(
    nodes: list[Node],
    shapes: dict[str, tuple[Any, ...]],
    signed: dict[str, bool],
    factors: Any,
    tables: dict[str, Any] | None = None,
) -> Program:
    """Operators between 8-bit values; the inputs a and b are quantized by 1, the last value is dequantized by 1."""
    n = BatchDim()
    inputs = sorted({v[0] for v in shapes if v.endswith("_q8")})
    start = [Node(f"{v}_q8", "quantize", [v]) for v in inputs]
    end = Node("out", "dequantize", [nodes[-1].name])
    types = {k: TensorType((n, *s)) for k, s in shapes.items()}
    types |= {v: types[f"{v}_q8"] for v in inputs} | {"out": types[nodes[-1].name]}
    ones = {f"{v}_q8": np.ones(1, np.float32) for v in inputs} | {"out": np.ones(1, np.float32)}
    qparams = {k: QParams(1.0, signed[k]) for k in shapes}
    graph = Graph(inputs, ["out"], [*start, *nodes, end], {}, types)
    return program_of(graph, [0.0], qparams, {}, tables, {**ones, **factors})


def run(program: Program, *inputs: np.ndarray) -> np.ndarray:
    executor = Executor(program)
    result: np.ndarray = executor.run([torch.from_numpy(x) for x in inputs], executor.settings(0))[0].numpy()
    return result


def test_eight_bit_operators_follow_their_formulas() -> None:
    """add, mul, concat, mean, avg_pool, table, movement: the float32 formulas of the program's documentation."""
    rng = np.random.default_rng(0)
    f = np.float32
    a = rng.integers(-127, 128, (3, 4, 6, 6)).astype(f)
    b = rng.integers(-127, 128, (3, 4, 6, 6)).astype(f)
    shape: tuple[Any, ...] = (4, 6, 6)
    two = {"a_q8": shape, "b_q8": shape}
    signs = {"a_q8": True, "b_q8": True, "y": True}
    clamp = {"clamp": [-127, 127]}

    def rounded(t: np.ndarray, lo: int = -127, hi: int = 127) -> np.ndarray:
        assert t.dtype == f
        return np.rint(np.clip(t, f(lo), f(hi)))

    factors = {"y": rng.uniform(0.2, 1.1, 2).astype(f)}
    add = eight_bit_graph([Node("y", "add", ["a_q8", "b_q8"], dict(clamp))], {**two, "y": shape}, signs, factors)
    assert (run(add, a, b) == rounded(a * factors["y"][0] + b * factors["y"][1])).all()
    relu = eight_bit_graph(
        [Node("y", "add", ["a_q8", "b_q8"], {"clamp": [0, 90]})], {**two, "y": shape}, signs, factors
    )
    assert (run(relu, a, b) == rounded(a * factors["y"][0] + b * factors["y"][1], 0, 90)).all()

    m = {"y": np.array([0.0071], f)}
    mul = eight_bit_graph([Node("y", "mul", ["a_q8", "b_q8"], dict(clamp))], {**two, "y": shape}, signs, m)
    assert (run(mul, a, b) == rounded((a * b).astype(f) * m["y"][0])).all()

    c = {"y": np.array([1.0, 0.37], f)}
    node = Node("y", "concat", ["a_q8", "b_q8"], {**clamp, "axis": 1})
    concat = eight_bit_graph([node], {**two, "y": (8, 6, 6)}, signs, c)
    assert (run(concat, a, b) == np.concatenate([a, rounded(b * c["y"][1])], axis=1)).all()

    one = {"a_q8": shape}
    s = {"a_q8": True, "y": True}
    r = {"y": np.array([0.043], f)}
    node = Node("y", "mean", ["a_q8"], {**clamp, "axes": [2, 3], "keepdim": False})
    total = a.astype(np.int64).sum(axis=(2, 3)).astype(f)
    assert (run(eight_bit_graph([node], {**one, "y": (4,)}, s, r), a) == rounded(total * r["y"][0])).all()

    pool = {"kernel": [2, 3], "stride": [2, 3], "padding": [0, 0], "ceil_mode": False, "count_include_pad": True}
    node = Node("y", "avg_pool", ["a_q8"], {**clamp, **pool})
    total = a.astype(np.int64).reshape(3, 4, 3, 2, 2, 3).sum(axis=(3, 5)).astype(f)
    assert (run(eight_bit_graph([node], {**one, "y": (4, 3, 2)}, s, r), a) == rounded(total * r["y"][0])).all()

    table = rng.integers(-127, 128, 256).astype(np.int8)
    program = eight_bit_graph(
        [Node("y", "table", ["a_q8"], {"function": "silu"})], {**one, "y": shape}, s, {}, {"y": table}
    )
    assert (run(program, a) == table[a.astype(int) + 128]).all()
    signs = {"a_q8": False, "y": True}
    unsigned = eight_bit_graph([Node("y", "table", ["a_q8"], {})], {**one, "y": shape}, signs, {}, {"y": table})
    assert (run(unsigned, np.abs(a) * 2) == table[np.abs(a).astype(int) * 2]).all()

    moves = [
        Node("p", "pad", ["a_q8"], {**clamp, "pads": [[0, 0], [0, 0], [1, 0], [0, 1]], "value": 0.0}),
        Node("g", "gather", ["p"], {**clamp, "axis": 1, "indices": [2, 0, 1]}),
        Node("t", "permute", ["g"], {**clamp, "axes": [0, 2, 1, 3]}),
        Node("y", "reshape", ["t"], {**clamp, "shape": [["N", 1], 7, 21]}),
    ]
    shapes: dict[str, tuple[Any, ...]] = {**one, "p": (4, 7, 7), "g": (3, 7, 7), "t": (7, 3, 7), "y": (7, 21)}
    moved = np.pad(a, ((0, 0), (0, 0), (1, 0), (0, 1)))[:, [2, 0, 1]].transpose(0, 2, 1, 3).reshape(3, 7, 21)
    assert (run(eight_bit_graph(moves, shapes, dict.fromkeys(shapes, True), {}), a) == moved).all()


def test_quantize_rounds_half_to_even_and_clamps() -> None:
    node = Node("y", "reshape", ["a_q8"], {"shape": [["N", 1], 9]})
    program = eight_bit_graph([node], {"a_q8": (9,), "y": (9,)}, {"a_q8": True, "y": True}, {"a_q8": np.array([2.0], np.float32)})
    x = np.array([[0.25, 0.75, 1.25, -0.25, -0.75, 63.5, 64.0, 1e30, -1e30]], np.float32)
    assert run(program, x).tolist() == [[0, 2, 2, 0, -2, 127, 127, 127, -127]]


def test_a_node_may_read_a_value_twice() -> None:
    a = np.array([[3.0, -5.0]], np.float32)
    node = Node("y", "add", ["a_q8", "a_q8"], {"clamp": [-127, 127]})
    program = eight_bit_graph(
        [node], {"a_q8": (2,), "y": (2,)}, {"a_q8": True, "y": True}, {"y": np.ones(2, np.float32)}
    )
    assert run(program, a).tolist() == [[6.0, -10.0]]


@pytest.mark.parametrize("extraction", ["static", "dynamic"])
def test_saturation_counts(make_layer_program: Any, oracle: Any, extraction: str) -> None:
    """Low activations clipped by the low range, against a count value by value."""
    rng = np.random.default_rng(2)
    weight = rng.integers(-127, 128, (3, 6)).astype(np.int8)
    program = make_layer_program(rng, weight, (6,), group_size=2, extraction=extraction)
    layer = program.layers["layer"]
    layer.activation_shift[:] = [0, 2, 4]
    x = rng.integers(0, 256, (20, 6)).astype(np.float32)
    slow = oracle.LayerOracle(layer, {}, x.astype(np.int64), False, extraction)
    for index in (2, 4):
        rows = count_saturation(program, [torch.from_numpy(x[:7]), torch.from_numpy(x[7:])], index)
        clipped = total = 0
        for n, c in np.ndindex(20, 6):
            g = int(slow.group_of[c])
            if layer.low[index, g]:
                total += 1
                clipped += oracle.rne_quotient(int(x[n, c]), int(slow.shifts[n, g])) > layer.amax
        assert rows == [{"layer": "layer", "ratio": program.ratios[index], "saturated": clipped, "total": total}]
        assert clipped > 0


def test_ratio_index() -> None:
    table = [0.0, 0.25, 0.5, 1.0]
    assert [ratio_index(table, r) for r in (0, 0.2, 0.25, 0.4999, 0.5, 0.99, 1)] == [0, 0, 1, 1, 2, 2, 3]
    assert ratio_index(table, 0.1 + 0.15) == 1 and ratio_index(table, 0.25 - 1e-12) == 1
    with pytest.raises(RatioError, match="band"):
        ratio_index([0.5, 1.0], 0.25)
    for bad in (True, "1", None, float("nan"), np.bool_(True), 1j, -1e-9):
        with pytest.raises(RatioError):
            ratio_index(table, bad)  # type: ignore[arg-type]


def test_live_bytes(helpers: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    config = QuantizeConfig()
    program = eight_bit_program(prepare(model, [helpers.images(4)], config), config)
    # the float input beside its 8-bit form, that beside the 8-bit result, and that beside the float output
    assert live_bytes_per_sample(program) == 64 * max(4 * 3 + 3, 3 + 4, 4 + 4 * 2)
