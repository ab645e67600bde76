"""Programs built by hand: small, but with every kind of layer and value that a file must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.quantization.effective_bits import plain_shift
from bitdial.quantization.instructions import Instruction, Window
from bitdial.quantization.program import BLOCK_ROWS, Program, QParams, QuantizedLayer
from hand_built import program_of

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
N = BatchDim()


def quantized_layer(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    *,
    group: int,
    ratios: tuple[float, ...] = RATIOS,
    eligible: bool = True,
    conv_groups: int = 1,
    granularity: str = "output",
    wmax: int = 7,
    nested: bool = True,
    cells: int = 64,
) -> QuantizedLayer:
    """A layer with random weights, shifts by the plain rule, and groups that go low in a random order."""
    outputs, local = shape[:2]
    starts = np.concatenate([np.arange(0, local, group) + g * local for g in range(conv_groups)])
    bounds = np.append(starts, local * conv_groups).astype(np.int32)
    n = len(bounds) - 1
    spread = np.exp2(rng.uniform(1, 7, size=(1, local, *[1] * (len(shape) - 2))))  # channels of differing range
    weight = np.clip(np.rint(rng.normal(size=shape) * spread * 0.4), -127, 127).astype(np.int8)
    largest = np.abs(weight.astype(int)).reshape(outputs, local, -1).max(axis=2)
    magnitude = np.maximum.reduceat(largest, np.arange(0, local, group), axis=1)
    rows = {"output": 1, "block": BLOCK_ROWS, "group": outputs}[granularity]
    for start in range(0, outputs, rows):
        magnitude[start : start + rows] = magnitude[start : start + rows].max(axis=0)
    low = np.zeros((len(ratios), n), np.bool_)
    if eligible:
        order = rng.permutation(n)
        for i, ratio in enumerate(ratios):
            low[i, (order if nested else rng.permutation(n))[: round(ratio * n)]] = True
    scale = (rng.uniform(0.5, 2, outputs) * 2e-3).astype(np.float32)
    corrections = rng.normal(0, 120, (len(ratios), outputs)).cumsum(axis=0)
    macs_per_channel = weight[:, 0].size // conv_groups * cells
    return QuantizedLayer(
        name=name,
        kind="linear" if len(shape) == 2 else "conv",
        weight=weight,
        weight_scale=scale,
        multiplier=(scale.astype(np.float64) * 0.0173).astype(np.float32),
        residual_factor=0.0,
        eligible=eligible,
        reason="" if eligible else "first layer",
        amax=15,
        wmax=wmax,
        group_bounds=bounds,
        activation_shift=rng.integers(0, 5, n).astype(np.uint8),
        weight_shift=plain_shift(magnitude, wmax),
        weight_granularity=granularity,
        group_macs=np.diff(bounds).astype(np.int64) * macs_per_channel,
        low=low,
        bias=(rng.normal(0, 3000, outputs) + corrections).astype(np.int32),
        conv_groups=conv_groups,
        accumulator_bound=2**24 + outputs,
        macs=macs_per_channel * local * conv_groups,
    )


def build(
    seed: int = 0, granularity: str = "output", nested: bool = True, ratios: tuple[float, ...] = RATIOS, wmax: int = 7
) -> Program:
    """First conv, grouped conv with ragged groups, depthwise conv, 1x1 conv with residual, SiLU table, pooling, matmul,
    linear, and a float tail with constants of several dtypes."""
    rng = np.random.default_rng(seed)
    common: dict[str, Any] = {"granularity": granularity, "nested": nested, "ratios": ratios, "wmax": wmax}
    layers = [
        quantized_layer(rng, "conv1", (20, 3, 3, 3), group=4, eligible=False, **common),
        quantized_layer(rng, "conv2", (12, 10, 3, 3), group=4, conv_groups=2, **common),
        quantized_layer(rng, "depthwise", (12, 1, 3, 3), group=1, conv_groups=12, eligible=False, **common),
        quantized_layer(rng, "conv3", (20, 12, 1, 1), group=5, **common),
        quantized_layer(rng, "fc", (10, 20), group=8, cells=1, **common),
    ]
    layers[3].residual_factor = float(np.float32(0.83))
    matmul = QuantizedLayer(
        "attention", "matmul", None, np.zeros(0, np.float32), np.array([3e-4], np.float32), 0.0, False, "matmul", 0, 0,
        np.zeros(1, np.int32), np.zeros(0, np.uint8), np.zeros((0, 0), np.uint8), granularity, np.zeros(0, np.int64),
        np.zeros((len(ratios), 0), np.bool_), np.zeros((len(ratios), 0), np.int32), macs=80,
    )  # fmt: skip

    def conv(name: str, source: str, groups: int, pad: int, **more: Any) -> Node:
        attrs = {"stride": [1, 1], "padding": [pad, pad], "dilation": [1, 1], "groups": groups}
        return Node(name, "conv", [source], attrs | more.pop("attrs", {}), source=f"body.{name}", **more)

    nodes = [
        Node("x_q8", "quantize", ["x"]),
        conv("conv1", "x_q8", 1, 1, attrs={"activation": {"kind": "relu"}}),
        conv("conv2", "conv1", 2, 1, attrs={"activation": {"kind": "clamp", "lo": 0.0, "hi": 6.0}}),
        conv("depthwise", "conv2", 12, 1),
        conv("conv3", "depthwise", 1, 0, residual="conv1"),
        Node("act", "table", ["conv3"], {"function": "silu"}),
        Node("pool", "mean", ["act"], {"axes": [2, 3], "keepdim": False}),
        Node("heads", "reshape", ["pool"], {"shape": [["N", 1], 4, 5]}),
        Node("attention", "matmul", ["heads", "heads"], {"transpose_b": True}),
        Node("fc", "linear", ["pool"], source="head"),
        Node("wave", "aten.sin.default", ["fc"], {"args": [{"value": 0}], "kwargs": {}}),
        Node("masked", "add", ["wave", "mask"]),
        Node("picked", "aten.index_select.default", ["masked", "picks"], {"args": [{"value": 0}, 1, {"value": 1}], "kwargs": {}}),
        Node("norm", "layer_norm", ["masked", "gamma"], {"normalized_shape": [10], "eps": 1e-5}),
        Node("out", "linear", ["norm"], weight="w_out", bias="b_out"),
    ]
    constants = {
        "mask": np.where(rng.random(10) < 0.3, -np.inf, 0.0).astype(np.float32),
        "picks": np.array([1, 3], np.int64),
        "gamma": rng.normal(size=10).astype(np.float32),
        "w_out": rng.normal(size=(6, 10)).astype(np.float32),
        "b_out": rng.normal(size=6).astype(np.float32),
    }
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (N, 3, 8, 8), "x_q8": (N, 3, 8, 8), "conv1": (N, 20, 8, 8), "conv2": (N, 12, 8, 8),
        "depthwise": (N, 12, 8, 8), "conv3": (N, 20, 8, 8), "act": (N, 20, 8, 8), "pool": (N, 20), "heads": (N, 4, 5),
        "attention": (N, 4, 4), "fc": (N, 10), "wave": (N, 10), "masked": (N, 10), "picked": (N, 2), "norm": (N, 10),
        "out": (N, 6),
    }  # fmt: skip
    signed = {
        "x_q8": True, "conv1": False, "conv2": False, "depthwise": True, "conv3": True, "act": True, "pool": True,
        "heads": True,
    }  # fmt: skip
    dtypes = {name: "int8" if s else "uint8" for name, s in signed.items()}
    types = {name: TensorType(shape, dtypes.get(name, "float32")) for name, shape in shapes.items()}
    curve: list[dict[str, Any]] = [{"ratio": r, "accuracy": 0.9 - 0.02 * i} for i, r in enumerate(ratios)]
    return program_of(
        Graph(["x"], ["out", "attention", "picked"], nodes, constants, types),
        ratios=list(ratios),
        qparams={n: QParams(float(np.float32(rng.uniform(0.01, 0.2))), s) for n, s in signed.items()},
        layers={layer.name: layer for layer in [*layers[:4], matmul, layers[4]]},
        tables={"act": rng.integers(-127, 128, 256).astype(np.int8)},
        factors={
            "x_q8": np.array([7.3], np.float32),
            "pool": np.array([0.0156], np.float32),
        },
        nested=nested,
        float_reasons={"wave": "no integer form", "out": "ignored"},
        provenance={"seed": seed, "config": {"selector": "greedy", "low_bits": 4}, "note": "gemäß", "worst": -np.inf},
        curve=[*curve, {"ratio": None, "name": "float32", "accuracy": 0.91}],
    )


@pytest.fixture(scope="session")
def make_program() -> Callable[..., Program]:
    """`build`: a fresh program by seed, granularity, nested, ratios, wmax."""
    return build


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., QuantizedLayer]:
    """`quantized_layer`: one random layer."""
    return quantized_layer


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Program, Program], None]:
    """Fails unless two programs are equal in every field, arrays in dtype, shape and bits."""

    def same(a: Any, b: Any, where: str) -> None:
        if isinstance(a, np.ndarray):
            assert isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape, where
            assert a.tobytes() == b.tobytes(), where
        elif isinstance(a, (Program, Graph, Node, QuantizedLayer, Instruction, Window)):
            assert type(a) is type(b)
            for field in vars(a):
                same(getattr(a, field), getattr(b, field), f"{where}.{field}")
        elif isinstance(a, dict):
            assert isinstance(b, dict) and a.keys() == b.keys(), where
            for key in a:
                same(a[key], b[key], f"{where}[{key}]")
        elif isinstance(a, (list, tuple)):
            assert type(a) is type(b) and len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                same(x, y, f"{where}[{i}]")
        else:
            assert isinstance(a, type(b)) and a == b, f"{where}: {a!r} is not {b!r}"

    return lambda a, b: same(a, b, "program")
