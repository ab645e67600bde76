"""Small networks with random float weights, quantized: what the CPU engine must run exactly as the reference engine does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.graph.operators import MOVEMENT
from bitdial.graph.verify import infer_shape, verify
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program

Floats = npt.NDArray[np.float32]
RELU = {"kind": "relu"}
RELU6 = {"kind": "clamp", "lo": 0.0, "hi": 6.0}
UNARY = [
    "hardswish",
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "softplus",
    "mish",
    "relu6",
]
# Float operators whose results do not depend on where a value lies: no rounding, or one.
EXACT = MOVEMENT | {"add", "mul", "concat", "relu", "relu6", "clamp", "leaky_relu", "dequantize", "quantize"}
QUICK = QuantizeConfig(
    target="paper",
    selector="random", calibration_images=12, search_images=4, batch_size=12, group_size=8, shift_choice="value_error"
)


class Network:
    """A graph built node by node from "x" of [N, *shape], with normal weights scaled to keep the signal's size."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = Graph(["x"], [], [], {}, {"x": TensorType((BatchDim(1), *shape))})

    def node(self, op: str, inputs: list[str], attrs: dict[str, Any] | None = None, **roles: str | None) -> str:
        node = Node(f"{op}_{len(self.graph.nodes)}", op, inputs, attrs or {}, **roles)
        shape = infer_shape(node, self.graph)
        assert shape is not None
        self.graph.types[node.name] = TensorType(shape)
        self.graph.nodes.append(node)
        return node.name

    def aten(self, name: str, shape: tuple[Any, ...], *args: Any, **kwargs: Any) -> str:
        """A float operator by its name in torch; strings among the arguments are values."""
        inputs = [a for a in args if isinstance(a, str)]
        own = [{"value": inputs.index(a)} if isinstance(a, str) else a for a in args]
        node = Node(f"aten_{len(self.graph.nodes)}", f"aten.{name}", inputs, {"args": own, "kwargs": kwargs})
        self.graph.types[node.name] = TensorType(shape)
        self.graph.nodes.append(node)
        return node.name

    def elsewhere(self, x: str) -> str:
        """An operator without a compiled form."""
        return self.aten("erf.default", self.graph.types[x].shape, x)

    def shape(self, value: str) -> tuple[Any, ...]:
        return self.graph.types[value].shape

    def constant(self, values: npt.NDArray[Any]) -> str:
        name = f"c{len(self.graph.constants)}"
        self.graph.constants[name] = values.astype(np.float32)
        return name

    def weights(self, *shape: int) -> str:
        """Rows of differing size, as trained networks have."""
        fan = int(np.prod(shape[1:]))
        size = np.exp2(self.rng.uniform(-2, 1, (shape[0], *[1] * (len(shape) - 1))))
        return self.constant(self.rng.normal(0, 1, shape) * size * np.sqrt(2 / fan))

    def conv(
        self,
        x: str,
        out: int,
        kernel: int | tuple[int, int] = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        dilation: int = 1,
        groups: int = 1,
        residual: str | None = None,
        activation: dict[str, Any] | None = RELU,
    ) -> str:
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = ((kh - 1) * dilation // 2, (kw - 1) * dilation // 2) if padding is None else padding
        attrs: dict[str, Any] = {
            "stride": [stride] * 2, "padding": list(pad), "dilation": [dilation] * 2, "groups": groups
        }  # fmt: skip
        if activation is not None:
            attrs["activation"] = dict(activation)
        weight = self.weights(out, self.shape(x)[1] // groups, kh, kw)
        bias = self.constant(self.rng.normal(0, 0.3, out))
        return self.node("conv", [x], attrs, weight=weight, bias=bias, residual=residual)

    def linear(self, x: str, out: int, activation: dict[str, Any] | None = RELU, residual: str | None = None) -> str:
        attrs = {} if activation is None else {"activation": dict(activation)}
        weight, bias = self.weights(out, self.shape(x)[-1]), self.constant(self.rng.normal(0, 0.3, out))
        return self.node("linear", [x], attrs, weight=weight, bias=bias, residual=residual)

    def unary(self, op: str, x: str) -> str:
        attrs = {"leaky_relu": {"slope": 0.125}, "elu": {"alpha": 1.0}, "gelu": {"approximate": "none"}}
        return self.node(op, [x], attrs.get(op, {}))

    def pool(self, op: str, x: str, kernel: int = 2, stride: int = 2, padding: int = 0, ceil: bool = False) -> str:
        attrs: dict[str, Any] = {
            "kernel": [kernel] * 2, "stride": [stride] * 2, "padding": [padding] * 2, "ceil_mode": ceil
        }  # fmt: skip
        attrs |= {"dilation": [1, 1]} if op == "max_pool" else {"count_include_pad": True}
        return self.node(op, [x], attrs)

    def mean(self, x: str, keepdim: bool = False) -> str:
        return self.node("mean", [x], {"axes": [2, 3], "keepdim": keepdim})

    def flatten(self, x: str) -> str:
        return self.node("reshape", [x], {"shape": [["N", 1], int(np.prod([int(d) for d in self.shape(x)[1:]]))]})

    def squeeze_and_excite(self, x: str, width: int) -> str:
        channels = int(self.shape(x)[1])
        gate = self.conv(self.conv(self.mean(x, keepdim=True), width, 1), channels, 1, activation=None)
        return self.node("mul", [x, self.unary("hardsigmoid", gate)])

    def head(self, x: str, classes: int = 5) -> str:
        return self.linear(self.mean(x), classes, activation=None)

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        verify(self.graph)
        return self.graph


# ---- networks of the kinds in use ------------------------------------------------------------------------------------------


def residual_net() -> Graph:
    """ResNet-like: a 7x7 stem with pooling, identity, strided and option A (padded, subsampled) shortcuts."""
    b = Network(3, 18, 14, seed=1)
    x = b.pool("max_pool", b.conv("x", 24, 7, stride=2), 3, 1, 1)
    x = b.conv(b.conv(x, 24), 24, residual=x)
    down = b.conv(x, 40, 1, stride=2, activation=None)
    x = b.conv(b.conv(x, 40, stride=2), 40, residual=down)
    even = b.node("slice", [x], {"axis": 2, "start": 0, "stop": int(b.shape(x)[2]), "step": 2})
    even = b.node("slice", [even], {"axis": 3, "start": 0, "stop": int(b.shape(x)[3]), "step": 2})
    short = b.node("pad", [even], {"pads": [[0, 0], [4, 4], [0, 0], [0, 0]], "value": 0.0})
    x = b.conv(b.conv(x, 48, stride=2), 48, residual=short)
    return b.done(b.head(x))


def mobile_net() -> Graph:
    """MobileNet-like: inverted residuals with depthwise layers, hardswish tables, squeeze and excite, linear bottlenecks."""
    b = Network(3, 12, 12, seed=2)
    x = b.unary("hardswish", b.conv("x", 16, stride=2, activation=None))
    for width, kernel in ((16, 3), (16, 5)):
        y = b.unary("hardswish", b.conv(x, 40, 1, activation=None))
        y = b.unary("hardswish", b.conv(y, 40, kernel, groups=40, activation=None))
        y = b.conv(b.squeeze_and_excite(y, 8), width, 1, activation=None)
        x = b.node("add", [x, y])
    x = b.conv(b.conv(x, 32, 3, stride=2, groups=16, activation=RELU6), 64, 1, activation=RELU6)
    return b.done(b.linear(b.unary("silu", b.linear(b.mean(x), 40, activation=None)), 7, activation=None))


def dense_net() -> Graph:
    """Concatenation of all that came before, average pooling between, layers of several kernels side by side."""
    b = Network(4, 10, 11, seed=3)
    x = b.conv("x", 16)
    for width in (12, 8):
        x = b.node("concat", [x, b.conv(b.conv(x, 32, 1), width)], {"axis": 1})
    x = b.pool("avg_pool", b.conv(x, 24, 1), 2, 2)
    parts = [b.conv(x, 8, 1), b.conv(x, 8, (1, 5)), b.conv(x, 9, (5, 1)), b.conv(x, 7, 3, dilation=2)]
    x = b.node("concat", [*parts, b.pool("max_pool", x, 3, 1, 1)], {"axis": 1})
    return b.done(b.head(b.conv(x, 24, 3, activation={"kind": "clamp", "lo": -1.0, "hi": 2.0})))


def plain_net() -> Graph:
    """VGG-like, with a flatten before two linear layers, pooling with ceil_mode and layers without activation."""
    b = Network(3, 9, 9, seed=4)
    x = b.pool("max_pool", b.conv(b.conv("x", 16), 33), 2, 2, 0, True)
    x = b.pool("max_pool", b.conv(b.conv(x, 65, activation=None), 40), 3, 2, 1)
    return b.done(b.linear(b.linear(b.linear(b.flatten(x), 72), 50, activation=None), 10, activation=None))


def grouped_net() -> Graph:
    """Grouped convolutions with channel shuffle, a depthwise layer of two outputs per channel, two outputs of the network."""
    b = Network(3, 8, 8, seed=5)
    x = b.conv("x", 48, 3)
    y = b.conv(x, 48, 3, groups=3, activation=None)
    y = b.node("reshape", [y], {"shape": [["N", 1], 3, 16, 8, 8]})
    y = b.node("reshape", [b.node("permute", [y], {"axes": [0, 2, 1, 3, 4]})], {"shape": [["N", 1], 48, 8, 8]})
    y = b.conv(b.conv(y, 96, 3, groups=48), 48, 3, groups=2, stride=1, residual=x)
    y = b.node(
        "gather", [b.node("roll", [y], {"shifts": [1], "axes": [3]})], {"axis": 1, "indices": [*range(40, 8, -1)]}
    )
    return b.done(b.head(b.conv(y, 20, 5, stride=2)), b.conv(y, 6, 1, activation=None))


def regnet() -> Graph:
    """RegNet-like: bottlenecks around layers of 7 and 32 convolution groups of few channels."""
    b = Network(3, 7, 8, seed=6)
    x = b.conv("x", 28)
    x = b.conv(b.conv(b.conv(x, 28, 1), 28, groups=7), 28, 1, residual=x)
    return b.done(b.head(b.conv(b.conv(b.conv(x, 64, 1), 64, groups=32), 40, 1)))


def wide_net() -> Graph:
    """Layers that a target's widths tell apart: 3x3 of 64 and 128 channels, strided, 1x1, signed inputs, one row."""
    b = Network(16, 6, 6, seed=3)
    x = b.conv("x", 64)
    x = b.conv(x, 64, activation=None)
    x = b.conv(b.conv(x, 128, 1), 128)
    x = b.conv(b.conv(x, 128, 1), 128, stride=2)
    return b.done(b.linear(b.linear(b.flatten(b.mean(x)), 128), 10, activation=None))


def padded_net() -> Graph:
    """Padding by operators of its own, as TensorFlow's "same": of the input, more on one side than on the other, before 3x3,
    5x5 and depthwise layers; and one that another operator reads as well."""
    b = Network(3, 11, 12, seed=7)

    def pad(x: str, top: int, bottom: int, left: int, right: int) -> str:
        return b.node("pad", [x], {"pads": [[0, 0], [0, 0], [top, bottom], [left, right]], "value": 0.0})

    x = b.conv(pad("x", 0, 1, 0, 1), 24, stride=2, padding=(0, 0))
    x = b.conv(pad(x, 1, 1, 1, 1), 40, padding=(0, 0), activation=None)
    x = b.conv(pad(x, 0, 3, 2, 1), 40, 5, groups=40, padding=(0, 0), activation=RELU6)
    both = pad(x, 0, 2, 0, 2)
    x = b.node("add", [both, b.conv(both, 40, padding=(1, 1))])
    x = b.conv(pad(x, 0, 1, 1, 0), 33, 3, stride=2, padding=(1, 0))
    return b.done(b.head(b.conv(pad(x, 0, 1, 0, 2), 24, 1, padding=(0, 0))))


NETWORKS = {
    "padded": padded_net,
    "residual": residual_net,
    "mobile": mobile_net,
    "dense": dense_net,
    "plain": plain_net,
    "grouped": grouped_net,
}


@st.composite
def networks(draw: st.DrawFn) -> Graph:
    """Random networks over all compiled operators."""
    b = Network(
        draw(st.integers(1, 6)), draw(st.integers(2, 9)), draw(st.integers(2, 9)), seed=draw(st.integers(0, 999))
    )
    activations = st.sampled_from([RELU, RELU6, None, {"kind": "clamp", "lo": -2.0, "hi": 3.0}])
    values = [b.conv("x", draw(st.integers(1, 40)), draw(st.sampled_from([1, 3])), activation=draw(activations))]
    kinds = [
        "conv",
        "conv",
        "conv",
        "grouped",
        "depthwise",
        "residual",
        "add",
        "concat",
        "pad",
        "pool",
        "unary",
        "gate",
    ]
    for _ in range(draw(st.integers(1, 8))):
        kind, x = draw(st.sampled_from([*kinds, "slice", "gather", "mul"])), draw(st.sampled_from(values))
        c, h, w = (int(d) for d in b.shape(x)[1:])
        same = [v for v in values if b.shape(v) == b.shape(x)]
        if kind == "conv":
            kernel = draw(st.sampled_from([1, 3, 3, (3, 1), 5, (2, 2)][: 6 if min(h, w) > 1 else 5]))
            y = b.conv(
                x, draw(st.integers(1, 70)), kernel, activation=draw(activations),
                padding=draw(st.sampled_from([None, None, (2, 1)])) if min(h, w) > 4 else None,
                stride=draw(st.sampled_from([1, 1, 2])), dilation=draw(st.sampled_from([1, 1, 2])) if min(h, w) > 6 else 1,
            )  # fmt: skip
        elif kind == "grouped":
            groups = draw(st.sampled_from([g for g in range(1, min(c, 8) + 1) if c % g == 0]))
            y = b.conv(x, groups * draw(st.integers(1, 12)), groups=groups, activation=draw(activations))
        elif kind == "depthwise":
            y = b.conv(
                x, c * draw(st.integers(1, 2)), draw(st.sampled_from([3, 5])), groups=c, activation=draw(activations)
            )
        elif kind == "residual":
            like = [v for v in values if b.shape(v)[2:] == b.shape(x)[2:]]
            y = b.conv(
                draw(st.sampled_from(like)), c, draw(st.sampled_from([1, 3])), residual=x, activation=draw(activations)
            )
        elif kind in ("add", "mul"):
            y = b.node(kind, [x, draw(st.sampled_from(same))])
        elif kind == "concat":
            like = [v for v in values if b.shape(v)[2:] == b.shape(x)[2:]]
            y = b.node("concat", [x, *draw(st.lists(st.sampled_from(like), min_size=1, max_size=2))], {"axis": 1})
        elif kind == "pad":
            pads = [[0, 0], [draw(st.integers(0, 9)), draw(st.integers(0, 9))], [0, 0], [0, draw(st.integers(0, 1))]]
            y = b.node("pad", [x], {"pads": pads, "value": 0.0})
        elif kind == "pool":
            if min(h, w) < 2:
                continue
            y = b.pool(draw(st.sampled_from(["max_pool", "avg_pool"])), x, 2, draw(st.integers(1, 2)))
        elif kind == "unary":
            y = b.unary(draw(st.sampled_from(UNARY)), x)
        elif kind == "gate":
            y = b.squeeze_and_excite(x, draw(st.integers(1, 9)))
        elif kind == "slice":
            axis = draw(st.integers(1, 3))
            size = int(b.shape(x)[axis])
            start = draw(st.integers(0, size - 1))
            attrs = {
                "axis": axis,
                "start": start,
                "stop": draw(st.integers(start + 1, size)),
                "step": draw(st.integers(1, 2)),
            }
            y = b.node("slice", [x], attrs)
        else:
            indices = draw(st.lists(st.integers(0, c - 1), min_size=1, max_size=20))
            y = b.node("gather", [x], {"axis": 1, "indices": indices})
        if int(b.shape(y)[1]) <= 120:
            values.append(y)
    last = values[-1]
    flat = b.mean(last) if draw(st.booleans()) else b.flatten(last)
    outputs = [b.linear(b.linear(flat, draw(st.integers(1, 40))), 3, activation=None)]
    if draw(st.integers(0, 3)) == 0:
        outputs.append(draw(st.sampled_from(values)))
    return b.done(*outputs)


# ---- quantized -------------------------------------------------------------------------------------------------------------


def samples(graph: Graph, n: int, seed: int = 0) -> Floats:
    """float32 [n, ...] inputs: normal, some samples flat or large."""
    rng = np.random.default_rng(seed)
    shape = [int(d) for d in graph.types["x"].shape[1:]]
    x = rng.normal(0, 1, (n, *shape)).astype(np.float32)
    for i in range(2, n, 4):
        x[i] *= rng.choice([0.0, 8.0])
    return x


def quantized(graph: Graph, config: QuantizeConfig = QUICK, seed: int = 0) -> Program:
    """A program whose bias rows differ at every ratio (bias correction alone moves them little)."""
    inputs = [torch.from_numpy(samples(graph, config.calibration_images, 1000 + seed))]
    program = quantize_prepared(prepare(graph, inputs, config), config)
    rng = np.random.default_rng(seed)
    for layer in program.layers.values():
        if layer.weight is not None:
            step = np.maximum(1.0, 3.0 / np.maximum(layer.multiplier, 1e-12)).clip(1, 2**16)
            layer.bias = layer.bias + np.round(rng.normal(0, 1, layer.bias.shape) * step).astype(np.int32)
    return program


def with_low_plane(program: Program, seed: int = 0) -> Program:
    """The program with low weights of their own in every layer that may run low: random ones, akin to nothing."""
    rng = np.random.default_rng(seed)
    result = copy.deepcopy(program)
    for layer in result.layers.values():
        if layer.weight is not None and layer.n_groups:
            layer.low_weight = rng.integers(-layer.wmax, layer.wmax + 1, layer.weight.shape).astype(np.int8)
    return result


def outputs_of(result: Any) -> list[Floats]:
    """NumPy outputs of a run, as a list."""
    return [np.asarray(o) for o in (result if isinstance(result, tuple) else (result,))]


def reference_outputs(program: Program, x: Floats) -> list[list[Floats]]:
    """Per ratio: the reference engine's outputs."""
    engine = ReferenceEngine(program)
    return [outputs_of(engine.run(x, r)) for r in program.ratios]


def same_bits(got: Floats, want: Floats) -> bool:
    """Equal to the last bit, but for the sign of zero: the reference holds 8-bit values as floats, and rne(-0.3) is -0."""
    return got.shape == want.shape and got.dtype == want.dtype == np.float32 and bool(
        ((got + 0.0).view(np.int32) == (want + 0.0).view(np.int32)).all()
    )  # fmt: skip


def check_engine(
    engine: CpuEngine, expected: list[list[Floats]], x: Floats, batches: tuple[int, ...] = (1, 3, 5)
) -> None:
    """Bit-identical outputs at every ratio and batch size; samples do not depend on their batch.

    Where float operators other than EXACT run elsewhere, in the reference engine, they are computed for the batch at hand:
    torch's vectorized forms may give a value another last bit at another place in the batch.
    """
    graph = engine.program.graph
    exact = all(graph.node(name).op in EXACT for name in engine.compiled.reasons)
    reference = None if exact else ReferenceEngine(engine.program)
    for index, ratio in enumerate(engine.ratios):
        for n in batches:
            got, said = engine.run_with_ratio(x[:n], ratio)
            assert said == ratio
            outputs = outputs_of(got)
            wanted = expected[index] if reference is None else outputs_of(reference.run(x[:n], ratio))
            assert len(outputs) == len(wanted)
            for name, own, want in zip(graph.outputs, outputs, wanted, strict=True):
                assert same_bits(own, want[:n]), (
                    f"{engine.isa}, kernels={engine.kernels}, {engine.threads} threads, ratio {ratio}, batch {n}, output "
                    f"{name}: {int((own != want[:n]).sum())} of {own.size} values differ"
                )
