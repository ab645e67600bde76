"""The reference executor against an int64 loop written from the mixed product, and a NumPy float32 epilogue."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.engines.reference import arithmetic
from bitdial.engines.reference.executor import Executor
from bitdial.quantization.byte_products import EXACT_FLOAT32, int8_product, int8_products
from bitdial.quantization.instructions import Window
from bitdial.quantization.program import Program

SEEDS = st.integers(0, 2**32 - 1)
EXTRACTION = st.sampled_from(["static", "dynamic", "naive"])
# (amax unsigned, amax signed, wmax): 4 bits, others of 2 to 7 bits, and limits that are no 2^b - 1
LIMITS = st.sampled_from([(15, 7, 7), (3, 1, 1), (31, 15, 7), (127, 63, 63), (14, 10, 10), (10, 14, 14), (15, 7, 14)])
ACTIVATIONS = st.sampled_from([None, {"kind": "relu"}, {"kind": "clamp", "lo": -20.0, "hi": 60.0}])


def run_layer(program: Program, inputs: list[np.ndarray], ratio_index: int) -> tuple[np.ndarray, np.ndarray]:
    """(accumulators, outputs) of the layer as the executor computes them."""
    executor = Executor(program)
    setting = executor.settings(ratio_index)
    tensors = [torch.from_numpy(x) for x in inputs]
    step = executor.instructions["layer"]
    batch = inputs[0].shape[0] // next(iter(program.graph.types[program.graph.inputs[0]].shape)).factor  # type: ignore
    acc = executor.accumulators(step, {step.inputs[0]: tensors[0]}, setting["layer"], batch)
    out = executor.run(tensors, setting)[0]
    return acc.double().numpy(), out.numpy()


def check(oracle: ModuleType, program: Program, inputs: list[np.ndarray], samples: np.ndarray | None = None) -> None:
    """Every ratio: accumulators and outputs equal the oracle's, bit for bit."""
    layer, node = program.layers["layer"], program.graph.node("layer")
    signed = program.qparams[node.inputs[0]].signed
    slow = oracle.LayerOracle(layer, node.attrs, inputs[0].astype(np.int64), signed, program.extraction, samples)
    clamp = node.attrs.get("clamp")
    for index in range(len(program.ratios)):
        expected = slow.accumulators(layer.low[index])
        acc, out = run_layer(program, inputs, index)
        assert acc.shape == expected.shape
        assert (acc == expected).all(), f"ratio {program.ratios[index]}"
        residual = inputs[1] if len(inputs) > 1 else None
        axis = 1 if layer.kind == "conv" else expected.ndim - 1
        if clamp is not None:
            factor = layer.residual_factor
            want = oracle.epilogue(
                expected, layer.bias[index], layer.multiplier, residual, factor, tuple(clamp), channel_axis=axis
            )
            assert out.dtype == np.float32 and (out == want).all()
        else:
            want = oracle.epilogue(expected, layer.bias[index], layer.multiplier, residual, 1.0, channel_axis=axis)
            kind = node.attrs.get("activation")
            if kind is not None:
                want = np.maximum(want, 0) if kind["kind"] == "relu" else np.clip(want, kind["lo"], kind["hi"])
            assert (out == want).all()


@settings(max_examples=35)
@given(seed=SEEDS, signed=st.booleans(), extraction=EXTRACTION, limits=LIMITS, activation=ACTIVATIONS, data=st.data())
def test_convolutions(
    oracle: ModuleType,
    make_layer_program: Any,
    random_integers: Any,
    seed: int,
    signed: bool,
    extraction: str,
    limits: tuple[int, int, int],
    activation: dict[str, Any] | None,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    spatial = data.draw(st.integers(1, 2))
    conv_groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = data.draw(st.booleans()) and conv_groups > 1
    local = 1 if depthwise else int(rng.integers(1, 8))
    outputs = conv_groups * int(rng.integers(1, 4))
    kernel = tuple(int(k) for k in rng.integers(1, 4, spatial))
    weight = np.clip(np.rint(rng.normal(size=(outputs, local, *kernel)) * 60), -127, 127).astype(np.int8)
    if rng.random() < 0.3:
        weight[:] = rng.choice([-127, 127], weight.shape)
    dilation = [int(d) for d in rng.integers(1, 3, spatial)]
    size = tuple(int(s) for s in rng.integers(5, 8, spatial))
    residual, float_output = bool(rng.random() < 0.5), bool(rng.random() < 0.25)
    program = make_layer_program(
        rng,
        weight,
        (local * conv_groups, *size),
        group_size=int(rng.integers(1, 5)),
        conv_groups=conv_groups,
        stride=[int(s) for s in rng.integers(1, 3, spatial)],
        padding=[int(p) for p in rng.integers(0, 3, spatial)],
        dilation=dilation,
        signed=signed,
        extraction=extraction,
        amax=limits[1] if signed else limits[0],
        wmax=limits[2],
        granularity=data.draw(st.sampled_from(["output", "block", "group"])),
        residual=residual,
        activation=activation,
        out_signed=bool(rng.random() < 0.5),
        float_output=float_output,
    )
    inputs = [random_integers(rng, (2, local * conv_groups, *size), signed)]
    if residual:
        shape = (2, *(int(d) for d in program.graph.types["layer"].shape[1:]))
        inputs.append(rng.integers(-127, 128, shape).astype(np.float32))
    check(oracle, program, inputs)


@settings(max_examples=35)
@given(seed=SEEDS, signed=st.booleans(), extraction=EXTRACTION, limits=LIMITS, activation=ACTIVATIONS)
def test_linear_layers(
    oracle: ModuleType,
    make_layer_program: Any,
    random_integers: Any,
    seed: int,
    signed: bool,
    extraction: str,
    limits: tuple[int, int, int],
    activation: dict[str, Any] | None,
) -> None:
    rng = np.random.default_rng(seed)
    channels, outputs = int(rng.integers(1, 40)), int(rng.integers(1, 20))
    weight = np.clip(np.rint(rng.normal(size=(outputs, channels)) * 60), -127, 127).astype(np.int8)
    tokens = () if seed % 2 else (int(rng.integers(1, 4)),)
    residual = bool(rng.random() < 0.5)
    program = make_layer_program(
        rng,
        weight,
        (*tokens, channels),
        group_size=int(rng.integers(1, 17)),
        signed=signed,
        extraction=extraction,
        amax=limits[1] if signed else limits[0],
        wmax=limits[2],
        granularity=str(rng.choice(["output", "block", "group"])),
        residual=residual,
        activation=activation,
        out_signed=bool(rng.random() < 0.5),
        float_output=bool(rng.random() < 0.25),
    )
    x = random_integers(rng, (3, channels, *tokens), signed)
    inputs = [np.ascontiguousarray(np.moveaxis(x, 1, -1))]
    if residual:
        inputs.append(rng.integers(-127, 128, (3, *tokens, outputs)).astype(np.float32))
    check(oracle, program, inputs)


@pytest.mark.parametrize(("depth", "path"), [(64, "float32"), (700, "nibbles"), (5000, "float64")])
@pytest.mark.parametrize("signed", [False, True])
def test_exact_beyond_float32(oracle: ModuleType, make_layer_program: Any, depth: int, path: str, signed: bool) -> None:
    """Adversarial: all weights at the limit, activations at the limit or odd, so that sums need more than 24 bits."""
    rng = np.random.default_rng(depth)
    depth *= 2 if signed else 1
    weight = np.full((3, depth), 127, np.int8)
    weight[1] = rng.choice([-127, 127], depth)
    weight[2, ::2] = 126
    program = make_layer_program(rng, weight, (depth,), group_size=32, signed=signed)
    bound = Executor(program).settings(0)["layer"].bound
    limit = EXACT_FLOAT32
    assert path == ("float32" if bound < limit else "nibbles" if bound < 8 * limit else "float64")
    top = 127 if signed else 255
    x = np.stack([np.full(depth, top), np.sign(weight[1]) * top if signed else rng.integers(0, 256, depth)])
    x = np.concatenate([x, [rng.integers(top - 4, top + 1, depth) | 1]]).astype(np.float32)
    check(oracle, program, [x])
    if path == "float64":  # the trap is real: float32 sums of the same integers are wrong
        truth = x.astype(np.int64) @ weight.astype(np.int64).T
        plain = F.linear(torch.from_numpy(x), torch.from_numpy(weight).float()).double().numpy()
        assert (plain != truth).any()


@pytest.mark.parametrize("depth", [64, 300, 1200])
def test_exact_beyond_float32_convolution(oracle: ModuleType, make_layer_program: Any, depth: int) -> None:
    rng = np.random.default_rng(depth)
    weight = rng.choice([-127, 126, 127], (2, depth, 3, 3), p=[0.1, 0.4, 0.5]).astype(np.int8)
    program = make_layer_program(rng, weight, (depth, 4, 4), group_size=100, padding=(1, 1), stride=(2, 2))
    x = rng.integers(250, 256, (1, depth, 4, 4)).astype(np.float32)
    check(oracle, program, [x])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_exact_without_onednn() -> None:
    """torch then takes NNPACK's Winograd for large batches of 3x3 convolutions, whose float32 sums are not exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (16, 56, 14, 14), generator=generator).float()
    w = torch.randint(-127, 128, (8, 56, 3, 3), generator=generator).float()
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    exact = F.conv2d(x.double(), w.double(), padding=1)
    with torch.backends.mkldnn.flags(enabled=False):
        got = arithmetic.accumulate(x, w, 1000, window)
    assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("bound", [100, EXACT_FLOAT32, 4 * EXACT_FLOAT32, 2**31])
def test_each_way_of_accumulating_is_exact(bound: int) -> None:
    """The split into nibbles and float64 give what float32 gives where that is exact."""
    rng = np.random.default_rng(5)
    for low, high in ((0, 256), (-127, 128)):
        x = torch.from_numpy(rng.integers(low, high, (4, 50)).astype(np.float32))
        w = torch.from_numpy(rng.integers(-127, 128, (6, 50)).astype(np.float32))
        got = arithmetic.accumulate(x, w, bound, None)
        assert torch.equal(got.double(), x.double() @ w.double().T)
        assert got.dtype == (torch.float32 if bound == 100 else torch.float64)


@settings(max_examples=25)
@given(seed=SEEDS, transpose=st.booleans(), signed=st.tuples(st.booleans(), st.booleans()))
def test_matmul_of_activations(seed: int, transpose: bool, signed: tuple[bool, bool]) -> None:
    rng = np.random.default_rng(seed)
    m, k, n = (int(v) for v in rng.integers(1, 9, 3))
    k = 400 if seed % 3 == 0 else k
    a = rng.integers(-127 if signed[0] else 0, 128 if signed[0] else 256, (2, 3, m, k))
    b = rng.integers(-127 if signed[1] else 0, 128 if signed[1] else 256, (2, 3, n, k) if transpose else (2, 3, k, n))
    if seed % 3 == 0:
        a[:], b[:] = 127 if signed[0] else 255, 127 if signed[1] else 255
        a[..., 0] -= 1
    bound = k * (127 if signed[0] else 255) * (127 if signed[1] else 255)
    b = b.swapaxes(-1, -2) if transpose else b
    got = arithmetic.accumulate_matmul(torch.from_numpy(a).float(), torch.from_numpy(b).float(), bound)
    assert (got.double().numpy() == a @ b).all()


@settings(max_examples=25)
@given(seed=SEEDS, fold=st.integers(2, 4), conv=st.booleans())
def test_dynamic_shifts_follow_the_sample_through_folded_windows(
    oracle: ModuleType, make_layer_program: Any, random_integers: Any, seed: int, fold: int, conv: bool
) -> None:
    """Windows folded into the batch share the shift of their sample."""
    rng = np.random.default_rng(seed)
    shape = (5, 4, 4) if conv else (3, 5)
    weight = rng.integers(-127, 128, (4, 5, 2, 2) if conv else (4, 5)).astype(np.int8)
    program = make_layer_program(rng, weight, shape, group_size=2, extraction="dynamic", fold=fold)
    x = rng.integers(0, 256, (2 * fold, *shape)) >> rng.integers(0, 8, (2 * fold, *[1] * len(shape)))
    rows = np.arange(2 * fold) // fold
    rest = (4, 4) if conv else (3,)
    samples = np.broadcast_to(rows.reshape(-1, *[1] * len(rest)), (2 * fold, *rest))
    check(oracle, program, [x.astype(np.float32)], samples)


def test_three_dimensional_convolution(oracle: ModuleType, make_layer_program: Any, random_integers: Any) -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(-127, 128, (3, 5, 2, 2, 2)).astype(np.int8)
    program = make_layer_program(rng, weight, (5, 3, 4, 3), group_size=2, padding=(1, 0, 1), stride=(1, 2, 1))
    check(oracle, program, [random_integers(rng, (2, 5, 3, 4, 3), False)])


def test_ratio_zero_is_the_plain_eight_bit_product(make_layer_program: Any) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (6, 20)).astype(np.int8)
    program = make_layer_program(rng, weight, (20,), group_size=8)
    x = rng.integers(0, 256, (4, 20)).astype(np.float32)
    acc, _ = run_layer(program, [x], 0)
    assert (acc == x.astype(np.int64) @ weight.astype(np.int64).T).all()
    low, _ = run_layer(program, [x], 4)
    assert (acc != low).any()


def test_rounding_of_the_epilogue_is_half_to_even(make_layer_program: Any) -> None:
    rng = np.random.default_rng(0)
    program = make_layer_program(rng, np.ones((1, 1), np.int8), (1,), group_size=1)
    layer = program.layers["layer"]
    layer.multiplier[:], layer.bias[:] = 0.5, 0
    x = np.arange(0, 10, dtype=np.float32).reshape(-1, 1)
    assert run_layer(program, [x], 0)[1].ravel().tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("extraction", ["static", "dynamic"])
def test_same_bits_on_a_gpu(make_layer_program: Any, random_integers: Any, extraction: str) -> None:
    rng = np.random.default_rng(4)
    weight = rng.integers(-127, 128, (8, 40, 3, 3)).astype(np.int8)
    program = make_layer_program(rng, weight, (40, 9, 9), group_size=16, padding=(1, 1), extraction=extraction)
    x = torch.from_numpy(random_integers(rng, (3, 40, 9, 9), False))
    here, there = Executor(program), Executor(program, "cuda")
    for index in range(len(program.ratios)):
        expected = here.run([x], here.settings(index))[0]
        assert torch.equal(there.run([x.cuda()], there.settings(index))[0].cpu(), expected)


def test_operands_of_float_operators_lie_in_one_order() -> None:
    """Equal values give equal bits wherever they lie: permuted, at an odd address, with other strides on axes of one element.
    Left as they are, each of them moves last bits (the first is checked: torch decides)."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 48, 1, 1, generator=rng)
    gamma = torch.randn(48, generator=rng)
    functions = [
        lambda v: v.mean((2, 3)),
        lambda v: F.conv2d(v, weight),
        lambda v: F.group_norm(v, 4, gamma, gamma),
        lambda v: v.flatten(1) @ v.flatten(1).mT,
        lambda v: F.silu(v),
    ]
    moved = 0
    for shape in ((5, 48, 1, 1), (3, 48, 5, 7)):
        x = torch.randn(shape, generator=rng)
        shifted = torch.empty(x.numel() + 1)[1:].view(shape).copy_(x)
        n, c, h, w = shape
        strided = torch.empty(n, h, w, c).permute(0, 3, 1, 2).copy_(x)
        for other in (shifted, strided, x.flip(0).flip(0), x.expand(shape)):
            own = arithmetic.in_order(other)
            assert torch.equal(own, x) and own.stride() == x.stride() and own.data_ptr() % arithmetic.ALIGNMENT == 0
            for function in functions:
                assert torch.equal(function(own), function(x))
                moved += not torch.equal(function(other), function(x))
        assert arithmetic.in_order(x).data_ptr() == x.data_ptr()  # no copy where none is needed
    assert moved  # or nothing was tested
    scalar = torch.tensor(3.0)
    assert arithmetic.in_order(scalar).shape == () and arithmetic.in_order(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.skipif(not int8_products(), reason="torch has no fast 8-bit products here")
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 3), (5, 3, 1), (1, 8, 1), (33, 1, 1), (1, 1, 17), (4, 2, 2)])
def test_eight_bit_products_of_few_rows_and_columns(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    n, inputs, outputs = shape
    x = torch.from_numpy(rng.integers(0, 256, (n, inputs)).astype(np.uint8))
    weight = torch.from_numpy(rng.integers(-127, 128, (outputs, inputs)).astype(np.float32))
    assert torch.equal(int8_product(x, weight).double(), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("signed", [False, True])
def test_eight_bit_products_are_exact(signed: bool) -> None:
    """Above 2^24 linear layers use torch's 8-bit product where it is fast; its sums are those of float64 at the extremes too."""
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.integers(-127 if signed else 0, 128 if signed else 256, (2, 5, 3000)).astype(np.float32))
    weight = torch.from_numpy(rng.integers(-127, 128, (7, 3000)).astype(np.float32))
    x[0, 0], weight[0] = (127.0 if signed else 255.0), 127.0
    exact = F.linear(x.double(), weight.double())
    assert exact.abs().max() > EXACT_FLOAT32
    found = arithmetic.accumulate(x, weight, 255 * 127 * 3000, None)
    assert found.dtype == torch.float64 and torch.equal(found, exact)
    if int8_products():
        assert torch.equal(int8_product(x, weight).double(), exact)
