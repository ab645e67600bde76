"""Attention, softmax and products of two activations in compiled steps, bit for bit as the reference engine has them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cpu_networks import QUICK, Network, outputs_of, quantized, reference_outputs, same_bits, samples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitdial.engines import attention
from bitdial.engines.cpu import compile_attention, native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.memory import Unsupported
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.engines.reference.ordered_softmax import softmax
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.program import Program

Array = npt.NDArray[Any]
ISAS = native.isas() if not native.missing() else []


# ---- the kernels -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Sizes, which operands are signed, and how their axes lie in memory (see `laid_out`)."""

    batch: int
    heads: int
    rows: int
    columns: int
    depth: int
    width: int
    signed: tuple[bool, bool, bool]
    layouts: tuple[int, int, int]
    extreme: bool
    terms: tuple[str, ...]
    threads: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, longest: int = 70) -> Case:
    sizes = [draw(st.integers(1, longest)) for _ in range(4)]
    kinds = st.sampled_from(("bias", "mask", "barred", "mul", "sub", "div", "rows", "fill", "keep", "tril"))
    return Case(
        draw(st.integers(1, 3)), draw(st.integers(1, 3)), *sizes, (draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        (draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 2))), draw(st.booleans()),
        tuple(draw(st.lists(kinds, max_size=3))), draw(st.sampled_from((1, 3))), draw(st.integers(0, 99)),
    )  # fmt: skip


def values(rng: np.random.Generator, shape: tuple[int, ...], signed: bool, extreme: bool) -> Array:
    low, high = (-127, 127) if signed else (0, 255)
    return rng.choice([low, high], shape) if extreme else rng.integers(low, high + 1, shape)


class Native:
    """A program of the extension whose tensors are arrays of ours."""

    def __init__(self, isa: str, case: Case) -> None:
        self.program = importlib.import_module("bitdial.engines.cpu._native").Program(isa, case.threads, [0.0])
        self.bound: list[tuple[int, Array]] = []

    def tensor(self, array: Array, is_float: bool = False, signed: bool = False, whole: bool = False) -> int:
        """array: [N, ...]."""
        tensor: int = self.program.add_tensor(
            h=1, w=1, c=array[0].size, is_float=is_float, external=True, zero=128 if signed else 0, whole=int(whole)
        )
        self.bound.append((tensor, array))
        return tensor

    def operand(self, array: Array, layout: int, signed: bool, table: Array | None = None) -> tuple[Any, ...]:
        """array: [N, heads, outer, inner], laid out in memory as it is, or transposed, or with the heads in the middle."""
        order = ((0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3))[layout]
        stored = np.ascontiguousarray((array + (128 if signed else 0)).transpose(order)).astype(np.uint8)
        offsets = np.arange(stored[0].size).reshape(stored.shape[1:]).transpose([order.index(i) - 1 for i in (1, 2, 3)])
        outer, inner, heads = compile_attention.strided(offsets)
        return self.tensor(stored, signed=signed), outer, inner, np.ascontiguousarray(heads), table, 128 if signed else 0

    def output(self, shape: tuple[int, ...], dtype: Any, signed: bool) -> tuple[tuple[Any, ...], Array]:
        """Of [N, heads, rows, columns], with the heads behind the rows."""
        n, heads, rows, columns = shape
        array = np.zeros((n, rows, heads, columns), dtype)
        tensor = self.tensor(array, dtype is np.float32, signed)
        return (tensor, heads * columns, 1, np.arange(heads) * columns, None, 0), array.transpose(0, 2, 1, 3)

    def run(self, n: int) -> None:
        self.program.finish()
        self.program.run(self.bound, n, 0)


def check_matmul(case: Case, isa: str, to_float: bool) -> None:
    rng = np.random.default_rng(case.seed)
    a = values(rng, (case.batch, case.heads, case.rows, case.depth), case.signed[0], case.extreme)
    b = values(rng, (case.batch, case.heads, case.columns, case.depth), case.signed[1], case.extreme)
    acc = np.einsum("nhid,nhjd->nhij", a.astype(np.float64), b.astype(np.float64))
    factor = np.float32(100 / max(1.0, np.abs(acc).max()))
    t = acc.astype(np.float32) * factor
    own = Native(isa, case)
    left, right = own.operand(a, case.layouts[0], case.signed[0]), own.operand(b, case.layouts[1], case.signed[1])
    out, got = own.output(acc.shape, np.float32 if to_float else np.uint8, not to_float)
    limits = (-np.inf, np.inf) if to_float else (-90.0, 100.0)
    own.program.add_matmul("product", left, right, out, acc.shape[2:] + (case.depth,), float(factor), *limits)
    own.run(case.batch)
    want = t if to_float else np.rint(np.clip(t, -90, 100)) + 128
    assert np.array_equal(got, want)
    assert own.program.counters() == [("product", "matmul", 0, acc.size * case.depth, acc.size * case.depth, 1)]


LONG = Case(1, 1, 7, 19, 3001, 1, (False, False, False), (0, 0, 0), True, (), 1, 0)


@pytest.mark.sanitize
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(ISAS or [""]), st.booleans())
@example(LONG, ISAS[0] if ISAS else "", True)
@example(LONG, "avx2" if "avx2" in ISAS else "portable", False)
def test_products(case: Case, isa: str, to_float: bool) -> None:
    check_matmul(case, isa, to_float)


def term(kind: str, case: Case, rng: np.random.Generator, own: Native) -> tuple[tuple[Any, ...], Array]:
    """(as the extension takes it, what broadcasts to [N, heads, rows, columns])."""
    n, h, i, j = case.batch, case.heads, case.rows, case.columns
    if kind == "bias":  # a constant per head
        array = rng.normal(0, 2, (1, h, i, j)).astype(np.float32)
        return (own.program.add_constant(array, w=h * i, c=j, whole=0), j, 1, np.arange(h) * i * j, "add", 0.0), array
    if kind in ("mul", "sub", "div"):
        array = np.full((1, 1, 1, 1), 0.7, np.float32)
        return (own.program.add_constant(array, w=1, c=1, whole=0), 0, 0, np.zeros(h, np.int64), kind, 0.0), array
    if kind == "tril":  # a constant of all heads
        array = ~np.tri(i, j, dtype=bool)[None, None]
        return (own.program.add_constant(array, w=i, c=j, whole=1), j, 1, np.zeros(h, np.int64), "fill", -np.inf), array
    if kind in ("fill", "keep"):  # keys of a sample
        array = rng.random((n, 1, 1, j)) < 0.4
        return (own.tensor(array, whole=True), 0, 1, np.zeros(h, np.int64), kind, -9.0), array
    if kind == "rows":  # one number per row of a sample
        array = rng.normal(0, 1, (n, 1, i, 1)).astype(np.float32)
        return (own.tensor(array, True), 1, 0, np.zeros(h, np.int64), "add", 0.0), array
    array = np.where(rng.random((n, 1, 1, j)) < 0.3, -np.inf if kind == "barred" else -1e4, 0.0).astype(np.float32)
    array[0] = -np.inf if kind == "barred" else 0.0  # a sample without a key
    return (own.tensor(array, True), 0, 1, np.zeros(h, np.int64), "add", 0.0), array


def check_attention(case: Case, isa: str, table: bool) -> None:
    rng = np.random.default_rng(case.seed)
    n, h = case.batch, case.heads
    q = values(rng, (n, h, case.rows, case.depth), case.signed[0], case.extreme)
    k = values(rng, (n, h, case.columns, case.depth), case.signed[1], case.extreme)
    v = values(rng, (n, h, case.width, case.columns), case.signed[2], case.extreme)
    own = Native(isa, case)
    bytes_ = rng.integers(1, 256, 256).astype(np.uint8) if table else None
    places = [
        own.operand(array, layout, signed, bytes_ if array is q else None)
        for array, layout, signed in zip((q, k, v), case.layouts, case.signed, strict=True)
    ]
    if bytes_ is not None:
        zero = 128 if case.signed[0] else 0
        q = bytes_[q + zero].astype(np.int64) - zero
    terms = [term(kind, case, rng, own) for kind in case.terms]
    acc = np.einsum("nhid,nhjd->nhij", q.astype(np.float64), k.astype(np.float64))
    factor = np.float32(6 / max(1.0, np.abs(acc).max()))
    scores = acc.astype(np.float32) * factor
    for (*_, op, value), array in terms:
        if op in ("fill", "keep"):
            scores = np.where(array == (op == "fill"), np.float32(value), scores)
        else:
            scores = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op](scores, array)
    p = np.rint(np.clip(softmax(torch.from_numpy(scores), 3).numpy() * np.float32(255), 0, 255))
    mixed = np.einsum("nhij,nhdj->nhid", p, v.astype(np.float64))
    out_factor = np.float32(100 / max(1.0, np.abs(mixed).max()))
    out, got = own.output(mixed.shape, np.uint8, True)
    own.program.add_attention(
        name="values", scores="scores", q=places[0], k=places[1], v=places[2], out=out,
        sizes=(case.rows, case.columns, case.depth, case.width), factor=float(factor), terms=[t for t, _ in terms],
        p=(255.0, 0.0, 255.0), out_factor=float(out_factor), lo=-127.0, hi=127.0,
    )  # fmt: skip
    own.run(n)
    assert np.array_equal(got, np.rint(mixed.astype(np.float32) * out_factor) + 128)
    assert [row[:2] + (row[3],) for row in own.program.counters()] == [
        ("scores", "attention", acc.size * case.depth), ("values", "attention", acc.size * case.width)
    ]  # fmt: skip


@pytest.mark.sanitize
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(ISAS or [""]), st.booleans())
def test_attention(case: Case, isa: str, table: bool) -> None:
    check_attention(case, isa, table)


@pytest.mark.slow
@settings(max_examples=1500, suppress_health_check=list(HealthCheck))
@given(cases(230), st.sampled_from(ISAS or [""]), st.booleans())
def test_attention_at_length(case: Case, isa: str, other: bool) -> None:
    check_attention(case, isa, other)
    check_matmul(case, isa, other)


@pytest.mark.sanitize
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.integers(1, 80), st.integers(1, 5), st.booleans(), st.sampled_from(ISAS or [""]))
def test_softmax(outer: int, length: int, inner: int, to_bytes: bool, isa: str) -> None:
    """Of floats along any axis; of bytes along the last, to rows that lie apart."""
    rng = np.random.default_rng(length)
    inner = 1 if to_bytes else inner
    x = rng.normal(0, 5, (2, outer, length, inner)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[0, 0] = -np.inf
    want = softmax(torch.from_numpy(x), 2).numpy()
    own = Native(isa, Case(2, 1, 1, 1, 1, 1, (False,) * 3, (0,) * 3, False, (), 3, 0))
    got = np.zeros((2, length, outer), np.uint8) if to_bytes else np.zeros_like(x)
    rows, column = (np.arange(outer), outer) if to_bytes else (np.zeros(0, np.int64), 1)
    src, dst = own.tensor(x, True), own.tensor(got, not to_bytes)
    own.program.add_softmax("softmax", src, dst, length, inner, rows, column, 255.0, 0.0, 255.0)
    own.run(2)
    if to_bytes:
        got, want = got.transpose(0, 2, 1), np.rint(np.clip(want * np.float32(255), 0, 255))[..., 0]
    assert np.array_equal(got, want)


def test_operands_outside_of_their_tensors_are_refused() -> None:
    case = Case(1, 1, 4, 4, 4, 4, (True,) * 3, (0,) * 3, False, (), 1, 0)
    own = Native(ISAS[0], case)
    good = own.operand(np.zeros((1, 1, 4, 4), np.int64), 0, True)
    out, _ = own.output((1, 1, 4, 4), np.float32, False)
    for bad in ((good[0], 5, 1), (good[0], 4, -1), (good[0], 4, 2)):
        with pytest.raises(ValueError, match="outside of its tensor"):
            own.program.add_matmul("product", (*bad, *good[3:]), good, out, (4, 4, 4), 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="differ in heads"):
        own.program.add_matmul("product", good, (*good[:3], np.zeros(2, np.int64), *good[4:]), out, (4, 4, 4), 1.0, 0.0, 1.0)


# ---- networks --------------------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """As Swin has it: windows folded into the batch, scaled queries, a bias per head, a mask for shifted windows."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = nn.Conv2d(3, 24, 2, 2), nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 5)
        self.shift = shift
        self.bias = nn.Parameter(torch.randn(3, 9, 9))
        places = torch.zeros(6, 6)
        places[4:], places[:, 4:] = 1, 2
        ids = places.reshape(2, 3, 2, 3).transpose(1, 2).reshape(4, 9)
        self.register_buffer("mask", (ids[:, None] != ids[:, :, None]).float() * -100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        moved = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        w = moved.reshape(-1, 2, 3, 2, 3, 24).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 24)
        q, k, v = self.qkv(w).reshape(-1, 9, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + self.bias
        if self.shift:
            scores = (scores.view(-1, 4, 3, 9, 9) + self.mask[None, :, None]).view(-1, 3, 9, 9)
        w = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 9, 24)
        moved = self.out(w).reshape(-1, 2, 2, 3, 3, 24).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 6, 24)
        y = torch.roll(moved, (self.shift, self.shift), (1, 2)) if self.shift else moved
        return self.head((x + y).flatten(1, 2).mean(1))


class Tokens(nn.Module):
    """As ViT has it, with keys and values of fewer heads than queries, and a mask where `causal`."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 24, 3, 3), nn.Linear(24, 5)
        self.q, self.kv, self.out = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(32, 24)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q = self.q(x).reshape(-1, 16, 4, 8).transpose(1, 2)
        k, v = self.kv(x).reshape(-1, 16, 1, 16).transpose(1, 2).expand(-1, 4, -1, -1).chunk(2, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head((x + self.out(y.transpose(1, 2).reshape(-1, 16, 32))).mean(1))


NETWORKS = {
    "windows": lambda: Windows(0), "shifted windows": lambda: Windows(1), "tokens": lambda: Tokens(False),
    "causal": lambda: Tokens(True),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is one step, or several: the outputs are those of the reference engine."""
    torch.manual_seed(4)
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(NETWORKS[name]().eval(), [helpers.images(12, 12, seed=1)], config), config)
    x = helpers.images(3, 12, seed=2).numpy()
    expected = reference_outputs(program, x)

    def refuse(c: Any, found: attention.Attention) -> None:
        raise Unsupported("it is a test")

    for found, possible in ((True, True), (True, False), (False, True)):
        fuse = found and possible
        with monkeypatch.context() as patch:
            patch.setattr(attention, "FUSE", found)
            if not possible:
                patch.setattr(compile_attention, "attention", refuse)
            engines = [CpuEngine(program, isa=isa, threads=2 if isa == ISAS[0] else 1, kernels="fixed") for isa in ISAS]
        for engine in engines:
            kinds = [kind for _, kind in engine.native.steps()]
            assert engine.compiled.reasons == {}
            assert (kinds.count("attention"), kinds.count("matmul"), kinds.count("softmax")) == ((1, 0, 0) if fuse else (0, 2, 1))
            if fuse:  # queries, keys and values are read where the layer before wrote them, the result is written for the next
                place = kinds.index("attention")
                assert kinds[place - 1] == kinds[place + 1] == "conv"
            for n in (1, 3):
                for ratio, want in zip(program.ratios, expected, strict=True):
                    assert same_bits(np.asarray(engine.run(x[:n], ratio)), want[0][:n]), (engine.isa, fuse, n, ratio)
    described = {layer["name"]: layer.get("kernel") for layer in engine.describe()["layers"]}
    assert [k for k in described.values() if k] == ["matmul", "matmul"]


def test_what_is_said_of_attention(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two products are described and counted as layers; the table of layers has one row for both."""
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(Tokens(False).eval(), [helpers.images(12, 12, seed=1)], config), config)
    scores, mixed = (layer for layer in program.layers.values() if layer.kind == "matmul")
    engine = CpuEngine(program, kernels="fixed")
    kernels = {layer["name"]: layer.get("kernel") for layer in engine.describe()["layers"]}
    assert kernels[scores.name] == kernels[mixed.name] == "attention"
    engine.run(helpers.images(2, 12, seed=2).numpy())
    counted = {row["layer"]: row for row in engine.counters() if row["kernel"] == "attention"}
    assert {name: row["high_macs"] for name, row in counted.items()} == {n.name: 2 * n.macs for n in (scores, mixed)}
    assert all(row["low_macs"] == 0 and row["runs"] == 1 for row in counted.values())
    monkeypatch.setattr(native, "peak", lambda isa, threads: {"gmacs_per_s": 1.0})
    rows = {row["layer"]: row for row in engine.layer_table(repeats=1)}
    assert scores.name not in rows and set(rows[mixed.name]["kernels"]) == {"attention"}
    seconds, speed = rows[mixed.name]["milliseconds"][0] / 1e3, rows[mixed.name]["gmacs_per_s"][0]
    assert speed * seconds == pytest.approx((scores.macs + mixed.macs) / 1e9)


def attention_read_twice() -> Program:
    """Weights that are an output as well, and scores that something else reads: no attention to fuse."""
    b = Network(4, 3, 3, seed=5)
    x = b.node("permute", [b.node("reshape", [b.conv("x", 16)], {"shape": [["N", 1], 16, 9]})], {"axes": [0, 2, 1]})
    scores = b.node("matmul", [b.linear(x, 16, None), x], {"transpose_b": True, "scale": 0.2})
    weights = b.node("softmax", [scores], {"axis": 2})
    y = b.node("matmul", [weights, x], {"transpose_b": False})
    again = b.node("matmul", [b.node("softmax", [scores], {"axis": 1}), y], {"transpose_b": False})
    head = b.linear(b.node("mean", [again], {"axes": [1], "keepdim": False}), 3, None)
    return quantized(b.done(head, weights), QUICK.updated(bias_correction=False))


def test_attention_that_is_read_twice() -> None:
    program = attention_read_twice()
    x = samples(program.graph, 3)
    expected = reference_outputs(program, x)
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, kernels="fixed")
        assert engine.compiled.reasons == {}
        for ratio, want in zip(program.ratios, expected, strict=True):
            for got, exact in zip(outputs_of(engine.run(x, ratio)), want, strict=True):
                assert same_bits(got, exact), (isa, ratio)


MASKS = {
    "added": lambda s, kept: s * 8**-0.5 + ((1.0 - kept) * -1e4)[:, None, None, :],
    "subtracted": lambda s, kept: s / 8**0.5 - ((1.0 - kept) * 1e4)[:, None, None, :],
    "filled": lambda s, kept: (s / 8**0.5).masked_fill((kept < 0.5)[:, None, None, :], -torch.inf),
    "turned": lambda s, kept: s + (kept[:, None, :, None] * torch.arange(11.0)).transpose(-1, -2),
    "chosen": lambda s, kept: torch.where((kept > 0.5)[:, None, None, :], s, -1e4).masked_fill(~TRIANGLE, -1e9),
}  # fmt: skip
TRIANGLE = torch.ones(11, 11, dtype=torch.bool).tril(2)


class Padded(nn.Module):
    """As BERT has it: a mask computed from an input, in one of the ways that people write."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.parts, self.mask = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), MASKS[mask]

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in self.parts[:3])
        scores = self.mask(q @ k.transpose(-1, -2), kept)
        return self.parts[3]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2) + x).mean(1)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_computed_from_an_input(mask: str) -> None:
    torch.manual_seed(6)
    x, kept = torch.randn(12, 11, 16), (torch.rand(12, 11) < 0.7).float()
    kept[:, 0] = 1.0
    config = QUICK.updated(bias_correction=False)
    program = quantize_prepared(prepare(Padded(mask).eval(), [x, kept], config), config)
    batch = x[:5].numpy(), kept[:5].numpy()
    reference = ReferenceEngine(program)
    expected = {ratio: np.asarray(reference.run(batch, ratio)) for ratio in program.ratios[::4]}
    for isa in ISAS:
        engine = CpuEngine(program, isa=isa, kernels="fixed")
        kinds = [kind for _, kind in engine.native.steps()]
        assert engine.compiled.reasons == {} and kinds.count("attention") == 1 and "softmax" not in kinds
        for ratio, want in expected.items():
            assert same_bits(np.asarray(engine.run(batch, ratio)), want), (isa, ratio)
