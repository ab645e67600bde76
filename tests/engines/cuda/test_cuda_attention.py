"""Attention in one kernel: ragged sizes, strides and masks against the reference's softmax, and networks, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cpu_networks import QUICK, reference_outputs, same_bits, samples
from cuda_layers import placed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_attention import MASKS, NETWORKS, Padded, attention_read_twice

from bitdial.engines import attention
from bitdial.engines.cuda import transformer
from bitdial.engines.cuda.arguments import AttentionArgs, Epilogue, Launch, Term
from bitdial.engines.cuda.emulated import EmulatedDevice
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.engines.reference.ordered_softmax import softmax
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
KINDS = ("bias", "mask", "barred", "mul", "sub", "div", "rows", "fill", "keep")
OPS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.fixture(scope="module")
def device(make_device: Any) -> EmulatedDevice:
    made: EmulatedDevice = make_device(False)
    return made


# ---- the kernels -----------------------------------------------------------------------------------------------------------


def term(kind: str, rng: np.random.Generator, sizes: tuple[int, int, int, int]) -> tuple[str, Array]:
    """(operation, what broadcasts to [N, heads, rows, keys])."""
    n, h, i, j = sizes
    if kind == "bias":
        return "add", rng.normal(0, 2, (1, h, i, j)).astype(np.float32)
    if kind in ("mul", "sub", "div"):
        return kind, np.full((1, 1, 1, 1), 0.7, np.float32)
    if kind in ("fill", "keep"):
        return kind, rng.random((n, 1, 1, j)) < 0.4
    if kind == "rows":
        return "add", rng.normal(0, 1, (n, 1, i, 1)).astype(np.float32)
    array = np.where(rng.random((n, 1, 1, j)) < 0.3, -np.inf if kind == "barred" else -1e4, 0.0).astype(np.float32)
    array[0] = -np.inf if kind == "barred" else 0.0  # a sample without a key
    return "add", array


def strides(array: Array, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array that broadcasts to those sizes, in elements."""
    return tuple(s // array.itemsize for s in np.broadcast_to(array, sizes).strides)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1),
       sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40), st.integers(1, 140)),
       depth=st.integers(1, 70), width=st.integers(1, 70), layouts=st.tuples(*[st.integers(0, 2)] * 3),
       block=st.sampled_from([16, 32]), kinds=st.lists(st.sampled_from(KINDS), max_size=4), extreme=st.booleans(),
       to_float=st.booleans())  # fmt: skip
def test_attention(
    device: EmulatedDevice, seed: int, sizes: tuple[int, int, int, int], depth: int, width: int, layouts: tuple[int, int, int],
    block: int, kinds: list[str], extreme: bool, to_float: bool,
) -> None:  # fmt: skip
    """Operands with either axis adjoining, on and off the multiples that allow long loads."""
    rng = np.random.default_rng(seed)
    n, h, i, j = sizes
    if block == 16:
        width = width + 3 & ~3  # words along the features of the values
    ends = (lambda shape: rng.choice([-127, 127], shape)) if extreme else (lambda shape: rng.integers(-127, 128, shape))
    q, k, v = (ends((n, h, *own)) for own in ((i, depth), (j, depth), (width, j)))
    terms = [term(kind, rng, sizes) for kind in kinds]
    acc = np.einsum("nhid,nhjd->nhij", q, k)
    factor = np.float32(6 / max(1.0, np.abs(acc).max()))
    scores = acc.astype(np.float32) * factor
    for op, array in terms:
        if op in OPS:
            scores = OPS[op](scores, array)
        else:
            scores = np.where(array == (op == "fill"), np.float32(-9), scores)
    p = np.rint(np.clip(softmax(torch.from_numpy(scores), 3).numpy() * np.float32(255), 0, 255)).astype(np.int64)
    mixed = np.einsum("nhij,nhdj->nhid", p, v)
    out_factor = np.array([100 / max(1, np.abs(mixed).max())], np.float32)
    want = mixed.astype(np.float32) * out_factor
    if not to_float:
        want = np.rint(want).astype(np.int8)

    spans, table, steps = list[Any](), list[Array](), list[list[int]]()
    for array, layout in zip((q, k, v), layouts, strict=True):  # 0: rows of depth; 1: depth by depth; 2: heads side by side
        order = ((0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3))[layout]
        memory = np.ascontiguousarray(array.transpose(order)).astype(np.int8)
        s = [0] * 4
        for place, axis in enumerate(order):
            s[axis] = memory.strides[place]
        spans.append(placed(device, memory.view(np.uint8)))
        steps.append(s)
        table.append(np.arange(h) * s[1])
    table.append(np.arange(h) * i * width)
    heads, multiplier = placed(device, np.stack(table, axis=1).astype(np.int32)), placed(device, out_factor)
    y = device.allocate(max(4, want.nbytes))
    padded, pitch = -(-j // 64) * 64, -(-max(j, depth) // 64) * 64 + 16
    args = AttentionArgs(
        q=spans[0], k=spans[1], v=spans[2], heads=heads, rows=i, keys=j, depth=depth, width=width, n_heads=h, n_terms=len(terms),
        q_sample=steps[0][0], k_sample=steps[1][0], v_sample=steps[2][0], q_row=steps[0][2], q_depth=steps[0][3],
        k_key=steps[1][2], k_depth=steps[1][3], v_width=steps[2][2], v_key=steps[2][3], padded=padded, pitch=pitch,
        factor=float(factor), weight_factor=255.0, weight_lo=0.0, weight_hi=255.0,
        out=Epilogue(**{"yf" if to_float else "y8": y}, multipliers=multiplier, one_multiplier=1, y_sample=h * i * width,
                     y_place=width, y_channel=1, lo=-np.inf if to_float else -127.0, hi=np.inf if to_float else 127.0),
    )  # fmt: skip
    for number, (op, array) in enumerate(terms):
        s = strides(array, sizes)
        own = [placed(device, array), placed(device, (np.arange(h) * s[1]).astype(np.int32))]
        spans += own
        args.terms[number] = Term(
            **{"floats" if op in OPS else "truths": own[0]}, heads=own[1], sample=s[0], row=s[2], key=s[3],
            op=transformer.TERMS[op], number=-9.0,
        )  # fmt: skip
    device.launch(Launch(f"attention_rows{block}", (-(-i // block), 1, n * h), args,
                         transformer.attention_bytes(block, padded, pitch)))  # fmt: skip
    found = np.empty(want.shape, want.dtype)
    device.download(y, found)
    for span in (*spans, heads, multiplier, y):
        device.free(span)
    assert np.array_equal(found, want)


# ---- networks --------------------------------------------------------------------------------------------------------------


def kernels_of(engine: CudaEngine) -> list[str]:
    return [launch.kernel for _, launch in engine._plan(2).launches(0)]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(device: EmulatedDevice, helpers: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One launch or several: the outputs are those of the reference engine."""
    torch.manual_seed(4)
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(NETWORKS[name]().eval(), [helpers.images(12, 12, seed=1)], config), config)
    x = helpers.images(3, 12, seed=2).numpy()
    expected = reference_outputs(program, x)
    for fuse in (True, False):
        monkeypatch.setattr(attention, "FUSE", fuse)
        engine = CudaEngine(program, device=device)
        kinds = [kernel.split("_")[0] for kernel in kernels_of(engine)]
        assert (kinds.count("attention"), kinds.count("matmul"), kinds.count("softmax")) == ((1, 0, 0) if fuse else (0, 2, 1))
        for ratio, want in zip(program.ratios[::4], expected[::4], strict=True):
            assert same_bits(np.asarray(engine.run(x, ratio)), want[0]), (fuse, ratio)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_computed_from_an_input(device: EmulatedDevice, mask: str) -> None:
    torch.manual_seed(6)
    x, kept = torch.randn(12, 11, 16), (torch.rand(12, 11) < 0.7).float()
    kept[:, 0] = 1.0
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(Padded(mask).eval(), [x, kept], config), config)
    batch = [x[:3].numpy(), kept[:3].numpy()]
    engine = CudaEngine(program, device=device)
    assert kernels_of(engine).count("attention_rows16") == 1 and "softmax_kernel" not in kernels_of(engine)
    assert same_bits(np.asarray(engine.run(batch)), np.asarray(ReferenceEngine(program).run(batch)))


@pytest.mark.parametrize("most", [0, 2000])
def test_attention_that_does_not_fit_is_taken_apart(
    device: EmulatedDevice, helpers: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    torch.manual_seed(4)
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(NETWORKS["tokens"]().eval(), [helpers.images(12, 12, seed=1)], config), config)
    monkeypatch.setattr(transformer, "MOST_SHARED", most)
    assert "softmax_kernel" in kernels_of(CudaEngine(program, device=device))


def test_attention_that_is_read_twice(device: EmulatedDevice) -> None:
    program: Program = attention_read_twice()
    x = samples(program.graph, 2)
    engine = CudaEngine(program, device=device)
    assert not [kernel for kernel in kernels_of(engine) if kernel.startswith("attention")]
    for got, want in zip(engine.run(x), reference_outputs(program, x)[0], strict=True):
        assert same_bits(got, want)
