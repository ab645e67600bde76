"""Programs of one layer, built by hand, so that every integer is under the test's control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.program import BLOCK_ROWS, Program, QParams, QuantizedLayer
from hand_built import program_of

RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]


def group_borders(channels: int, size: int, conv_groups: int) -> np.ndarray:
    """Groups of `size` inside every convolution group; the last of each may be short."""
    width = channels // conv_groups
    return np.array([g * width + s for g in range(conv_groups) for s in range(0, width, size)] + [channels], np.int32)


def layer_program(
    rng: np.random.Generator,
    weight: np.ndarray,
    in_shape: tuple[int, ...],
    *,
    group_size: int = 4,
    conv_groups: int = 1,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    signed: bool = False,
    extraction: str = "static",
    amax: int | None = None,
    wmax: int = 7,
    granularity: str = "output",
    residual: bool = False,
    activation: dict[str, Any] | None = None,
    out_signed: bool = True,
    float_output: bool = False,
    fold: int = 1,
) -> Program:
    """x (float integers) -> quantize by 1 -> layer -> dequantize by 1, so that inputs and outputs are the integers.

    weight: int8 [O, I/conv_groups, *kernel]. in_shape: of one sample, channels first (conv) or last (linear). fold: the
    first axis of the input is fold * batch. Low groups: a random nested order over the ratios.
    """
    conv = weight.ndim > 2
    outputs, local = weight.shape[:2]
    channels = local * conv_groups
    amax = (7 if signed else 15) if amax is None else amax
    bounds = group_borders(channels, group_size, conv_groups)
    n_groups, n_local = len(bounds) - 1, (len(bounds) - 1) // conv_groups
    top_shift = naive_shift(signed, amax)
    activation_shift = rng.integers(0, top_shift + 1, n_groups).astype(np.uint8)
    weight_shift = rng.integers(0, naive_shift(True, wmax) + 1, (outputs, n_local)).astype(np.uint8)
    if extraction == "naive":
        activation_shift[:], weight_shift[:] = top_shift, naive_shift(True, wmax)
    tie = {"output": 1, "block": BLOCK_ROWS, "group": outputs}[granularity]
    for start in range(0, outputs, tie):
        weight_shift[start : start + tie] = weight_shift[start]
    order = rng.permutation(n_groups)
    low = np.zeros((len(RATIOS), n_groups), np.bool_)
    for i, ratio in enumerate(RATIOS):
        low[i, order[: round(ratio * n_groups)]] = True
    spatial = weight.ndim - 2
    attrs: dict[str, Any] = {}
    if conv:
        attrs = {
            "stride": list(stride) or [1] * spatial,
            "padding": list(padding) or [0] * spatial,
            "dilation": list(dilation) or [1] * spatial,
            "groups": conv_groups,
        }
        sizes = [
            (d + 2 * p - dil * (k - 1) - 1) // s + 1
            for d, k, s, p, dil in zip(
                in_shape[1:], weight.shape[2:], attrs["stride"], attrs["padding"], attrs["dilation"], strict=True
            )
        ]
        out_shape: tuple[int, ...] = (outputs, *sizes)
    else:
        out_shape = (*in_shape[:-1], outputs)
    if activation is not None:
        attrs["activation"] = activation
    bound = int(np.abs(weight.astype(np.int64)).reshape(outputs, -1).sum(axis=1).max()) * (127 if signed else 255)
    spread = max(1, min(bound, 2**24))
    layer = QuantizedLayer(
        name="layer",
        kind="conv" if conv else "linear",
        weight=weight,
        weight_scale=np.ones(outputs, np.float32),
        multiplier=(rng.uniform(20, 400, outputs) / spread).astype(np.float32),
        residual_factor=float(np.float32(rng.uniform(0.2, 2.0))) if residual and not float_output else 0.0,
        eligible=True,
        reason="",
        amax=amax,
        wmax=wmax,
        group_bounds=bounds,
        activation_shift=activation_shift,
        weight_shift=weight_shift,
        weight_granularity=granularity,
        group_macs=np.diff(bounds).astype(np.int64),
        low=low,
        bias=rng.integers(-spread, spread + 1, (len(RATIOS), outputs)).astype(np.int32),
        conv_groups=conv_groups,
        accumulator_bound=bound,
        macs=channels,
    )
    n = BatchDim(fold)
    out = QParams(1.0, out_signed)
    if not float_output:
        lo, hi = out.qmin, out.qmax
        if activation is not None:
            lo = max(lo, 0 if activation["kind"] == "relu" else int(activation["lo"]))
            hi = hi if activation["kind"] == "relu" else min(hi, int(activation["hi"]))
        attrs["clamp"] = [lo, hi]
    nodes = [Node("x_q8", "quantize", ["x"]), Node("layer", "conv" if conv else "linear", ["x_q8"], attrs)]
    types = {
        "x": TensorType((n, *in_shape)),
        "x_q8": TensorType((n, *in_shape), "int8" if signed else "uint8"),
        "layer": TensorType((n, *out_shape), "float32" if float_output else "int8" if out_signed else "uint8"),
    }
    qparams = {"x_q8": QParams(1.0, signed)}
    factors = {"x_q8": np.ones(1, np.float32)}
    inputs = ["x"]
    if residual:
        inputs.append("r")
        types["r"] = TensorType((n, *out_shape))
        nodes[1].residual = "r"
        if not float_output:
            nodes.insert(1, Node("r_q8", "quantize", ["r"]))
            types["r_q8"] = TensorType((n, *out_shape), "int8")
            qparams["r_q8"] = QParams(1.0, True)
            factors["r_q8"] = np.ones(1, np.float32)
            nodes[2].residual = "r_q8"
    if not float_output:
        nodes.append(Node("out", "dequantize", ["layer"]))
        types["out"] = TensorType((n, *out_shape))
        factors["out"] = np.ones(1, np.float32)
        qparams["layer"] = out
    graph = Graph(inputs, ["layer" if float_output else "out"], nodes, {}, types)
    return program_of(graph, list(RATIOS), qparams, {"layer": layer}, {}, factors, extraction=extraction)


@pytest.fixture(scope="session")
def make_layer_program() -> Any:
    return layer_program


def integers(rng: np.random.Generator, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    """float32 integers of an 8-bit tensor: channels of differing range, extremes, zeros and saturated groups."""
    top = 127 if signed else 255
    reach = rng.choice([0, 1, 7, 15, 28, 31, 64, 127, top], size=(1, *shape[1:2], *[1] * (len(shape) - 2)))
    x = rng.integers(0, top + 1, shape) % (np.broadcast_to(reach, shape) + 1)
    kind = rng.integers(0, 5)
    if kind == 0:
        x[:] = 0
    elif kind == 1:
        x[:] = top
    elif kind == 2:
        x[rng.integers(0, shape[0])] = top
    if signed:
        x = x * rng.choice([-1, 1], shape)
    return x.astype(np.float32)


@pytest.fixture(scope="session")
def random_integers() -> Any:
    return integers
