"""Single layers for the kernels of the CPU engine: random ones, the exact oracle, and the layer as a compiled program.

The oracle is written from the design notes, section 1, in NumPy (int64, and float64 where every number is a small integer);
it shares no code with bitdial.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from bitdial.engines.cpu import native

Ints = npt.NDArray[np.int64]
METHODS = ("direct", "fip", "winograd", "winograd_fip", "narrow")
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of every program here; the masks of low groups at them are a case's own
GUARD = 96  # bytes on either side of an output that no kernel may touch


@dataclass
class LayerCase:
    """A convolution (or linear layer: 1 x 1 on 1 x 1 pixels) with its input.

    x: int64 [N, C, H, W]. weight: int8 [O, C / conv_groups, kh, kw]. low: bool [len(RATIOS), groups]. bias: int32
    [len(RATIOS), O]. Others as in QuantizedLayer (low_weight: None, or integers of their own). halo: margin of the input tensor
    beyond the padding.
    """

    x: Ints
    weight: npt.NDArray[np.int8]
    bounds: npt.NDArray[np.int32]
    activation_shift: npt.NDArray[np.uint8]
    weight_shift: npt.NDArray[np.uint8]
    low: npt.NDArray[np.bool_]
    bias: npt.NDArray[np.int32]
    amax: int
    wmax: int
    signed: bool
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    conv_groups: int = 1
    halo: tuple[int, int] = (0, 0)
    low_weight: npt.NDArray[np.int8] | None = None
    dynamic: bool = False  # activation shifts follow from each sample's values, and activation_shift is not used

    @property
    def out_size(self) -> tuple[int, int]:
        sizes = zip(self.x.shape[2:], self.weight.shape[2:], self.stride, self.pad, self.dilation, strict=True)
        h, w = ((d + 2 * p - dil * (k - 1) - 1) // s + 1 for d, k, s, p, dil in sizes)
        return h, w

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the batch."""
        h, w = self.out_size
        return len(self.x) * h * w * self.weight.size

    def __repr__(self) -> str:  # what hypothesis prints of a failing example
        cut = {"x": list(self.x.shape), "weight": list(self.weight.shape), "bounds": self.bounds.tolist()}
        cut |= {k: getattr(self, k) for k in "stride pad dilation conv_groups halo amax wmax signed".split()}
        cut |= {"activation_shift": self.activation_shift.tolist(), "low": self.low.astype(int).tolist()}
        cut["low_weight"] = "derived" if self.low_weight is None else "stored"
        cut["dynamic"] = self.dynamic
        return f"LayerCase({', '.join(f'{k}={v}' for k, v in cut.items())})"


# ---- the oracle ------------------------------------------------------------------------------------------------------------


def lowered(values: npt.NDArray[Any], shift: npt.NDArray[Any], low: int, high: int) -> Ints:
    """clamp(rne(v / 2^s), low, high); both the quotient and rint (half to even) are exact in float64."""
    return np.clip(np.rint(values / np.exp2(shift.astype(np.float64))), low, high).astype(np.int64)


def low_weights(case: LayerCase) -> Ints:
    """[O, C / conv_groups, kh, kw]: weights of low groups before their shift."""
    if case.low_weight is not None:
        return case.low_weight.astype(np.int64)
    widths = np.diff(case.bounds)[: case.weight_shift.shape[1]]
    own_shift = np.repeat(case.weight_shift, widths, axis=1)[:, :, None, None]
    return lowered(case.weight.astype(np.int64), own_shift, -case.wmax, case.wmax)


def sample_shifts(case: LayerCase) -> Ints:
    """[N, groups]: how far activations are shifted."""
    if not case.dynamic:
        return np.tile(case.activation_shift.astype(np.int64), (len(case.x), 1))
    shifts = [
        [max(0, int(np.abs(group).max(initial=0)).bit_length() - case.amax.bit_length())
         for group in np.split(sample, case.bounds[1:-1])] for sample in case.x
    ]  # fmt: skip
    return np.array(shifts, np.int64)


def columns(case: LayerCase, x: Ints) -> npt.NDArray[np.float64]:
    """float64 [C, taps, N * OH * OW]: what every output reads; zero outside of the image."""
    kh, kw = case.weight.shape[2:]
    oh, ow = case.out_size
    (ph, pw), (sh, sw), (dh, dw) = case.pad, case.stride, case.dilation
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw))).astype(np.float64)
    taps = [
        padded[:, :, i * dh : i * dh + (oh - 1) * sh + 1 : sh, j * dw : j * dw + (ow - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return np.stack(taps, axis=1).transpose(2, 1, 0, 3, 4).reshape(x.shape[1], kh * kw, -1)


def mixed_product(case: LayerCase, index: int) -> Ints:
    """int64 [N, OH, OW, O]: acc[o] = sum over low g ( sum a_low w_low ) << (sa[g] + sw[o, g]) + sum over high g, a8 w8."""
    outputs, per = case.weight.shape[:2]
    n_local = case.weight_shift.shape[1]
    widths = np.diff(case.bounds)
    shifts = sample_shifts(case)
    shift = np.repeat(shifts, widths, axis=1)[:, :, None, None]
    x8 = columns(case, case.x)
    x4 = columns(case, lowered(case.x, shift, -case.amax if case.signed else 0, case.amax))
    w8, w4 = case.weight.astype(np.int64), low_weights(case)
    acc = np.zeros((outputs, x8.shape[2]), np.int64)
    rows = outputs // case.conv_groups
    for g in range(len(widths)):
        c, local = divmod(g, n_local)
        channels = slice(int(case.bounds[g]), int(case.bounds[g + 1]))
        own = slice(channels.start - c * per, channels.stop - c * per)
        out = slice(c * rows, (c + 1) * rows)
        low = bool(case.low[index, g])
        x, w = (x4, w4) if low else (x8, w8)
        # every product and every sum is an integer below 2^53
        total = w[out, own].reshape(rows, -1).astype(np.float64) @ x[channels].reshape(-1, x.shape[2])
        by_sample = np.repeat(shifts[:, g], total.shape[1] // len(case.x))
        factor = 1 << (by_sample + case.weight_shift[out, local].astype(np.int64)[:, None]) if low else np.ones((1, 1), int)
        acc[out] += total.astype(np.int64) * factor
    return acc.T.reshape(len(case.x), *case.out_size, outputs)


# ---- the layer in the extension --------------------------------------------------------------------------------------------


@dataclass
class Output:
    """Where the layer's result goes: "accumulators" (int32 sums with bias), "bytes" or "float", and its epilogue.

    multiplier: float32 [O]. lo, hi: limits. signed: of byte outputs. channels_first: NCHW floats. halo: margin of byte
    outputs. residual: int64 (bytes) or float32 [N, OH, OW, O], or None.
    """

    kind: str = "accumulators"
    multiplier: npt.NDArray[np.float32] | None = None
    lo: float = -np.inf
    hi: float = np.inf
    signed: bool = False
    channels_first: bool = False
    halo: tuple[int, int] = (0, 0)
    residual: npt.NDArray[Any] | None = None
    residual_signed: bool = False
    residual_factor: float = 0.0


@dataclass
class CompiledLayer:
    """A case as a program of the extension. dirt: behind a layer that leaves its marks in the scratch memory; without it, the
    scratch memory is no larger than the case itself asks for."""

    case: LayerCase
    isa: str
    threads: int = 1
    output: Output = field(default_factory=Output)
    folded: bool = False
    small: bool = False  # memory="small": low weights are made block by block while the layer runs
    dirt: bool = True

    def __post_init__(self) -> None:
        case, out = self.case, self.output
        n, c, h, w = case.x.shape
        oh, ow = case.out_size
        outputs = len(case.weight)
        program: Any = native.extension().Program(self.isa, self.threads, list(RATIOS), self.small)
        self.native = program
        if self.dirt:
            self._add_dirt()
        self.x = program.add_tensor(h=h, w=w, c=c, is_float=True, channels_first=True, external=True)
        halo = (case.pad[0] + case.halo[0], case.pad[1] + case.halo[1])
        q = program.add_tensor(h=h, w=w, c=c, zero=128 if case.signed else 0, halo=halo)
        lo, hi = (-127.0, 127.0) if case.signed else (0.0, 255.0)
        program.add_quantize("input", self.x, q, 1.0, lo, hi)
        zero = 128 if out.signed else 0
        is_float = out.kind != "bytes"
        first = out.channels_first
        if out.halo != (0, 0):  # bytes with a margin, read back as floats: 1 * q is exact
            inner = program.add_tensor(h=oh, w=ow, c=outputs, zero=zero, halo=out.halo)
            self.y = program.add_tensor(h=oh, w=ow, c=outputs, is_float=True, external=True)
        else:
            self.y = inner = program.add_tensor(
                h=oh,
                w=ow,
                c=outputs,
                is_float=is_float,
                channels_first=first,
                external=True,
                zero=0 if is_float else zero,
            )
        self.residual = -1
        if out.residual is not None:
            floats = out.residual.dtype.kind == "f"
            self.residual = program.add_tensor(
                h=oh, w=ow, c=outputs, is_float=floats, channels_first=floats and first, external=True,
                zero=0 if floats or not out.residual_signed else 128,
            )  # fmt: skip
        multiplier = np.ones(outputs, np.float32) if out.multiplier is None else out.multiplier
        program.add_conv(
            "layer", src=q, dst=inner, residual=self.residual, residual_factor=out.residual_factor, lo=out.lo, hi=out.hi,
            accumulators=out.kind == "accumulators", folded=self.folded, weight=case.weight, stride=case.stride,
            pad=case.pad, dilation=case.dilation, conv_groups=case.conv_groups, amax=case.amax, wmax=case.wmax,
            input_signed=case.signed, bounds=case.bounds, activation_shift=case.activation_shift,
            weight_shift=case.weight_shift, low=case.low.astype(np.uint8), bias=case.bias, multiplier=multiplier,
            low_weight=case.low_weight, dynamic=case.dynamic,
        )  # fmt: skip
        if out.halo != (0, 0):
            program.add_dequantize("output", inner, self.y, 1.0)
        program.finish()

    def _add_dirt(self) -> None:
        """A Winograd layer in front: scratch memory then holds its sums instead of zeros."""
        rows, width = len(RATIOS), 24
        self.dirt_x = self.native.add_tensor(h=6, w=6, c=width, external=True)
        self.dirt_y = self.native.add_tensor(h=6, w=6, c=40, is_float=True, external=True)
        inner = self.native.add_tensor(h=6, w=6, c=width, halo=(1, 1))
        self.native.add_rescale("dirt input", self.dirt_x, inner, 3, 0, 1.0, 0.0, 255.0)
        self.native.add_conv(
            "dirt", src=inner, dst=self.dirt_y, lo=-np.inf, hi=np.inf, accumulators=True,
            weight=np.full((40, width, 3, 3), -127, np.int8), stride=(1, 1), pad=(1, 1), dilation=(1, 1), conv_groups=1,
            amax=15, wmax=7, input_signed=False, bounds=np.array([0, width], np.int32),
            activation_shift=np.full(1, 4, np.uint8), weight_shift=np.full((40, 1), 4, np.uint8),
            low=np.ones((rows, 1), np.uint8), bias=np.full((rows, 40), 7, np.int32), multiplier=np.ones(40, np.float32),
        )  # fmt: skip
        if self.native.methods("dirt")[METHODS.index("winograd")] == "":
            for index in range(rows):
                self.native.choose("dirt", index, METHODS.index("winograd"), 0)

    def unsupported(self) -> dict[str, str]:
        """Method to "" if it is exact for the layer, else why not."""
        return dict(zip(METHODS, self.native.methods("layer"), strict=True))

    def exact(self) -> list[str]:
        return [m for m, why in self.unsupported().items() if not why]

    def choose(self, index: int, method: str, chunk: int = 0) -> None:
        self.native.choose("layer", index, METHODS.index(method), chunk)

    def run(self, index: int) -> npt.NDArray[Any]:
        """The layer's output at a ratio: int64 accumulators or bytes (their values), or float32; [N, OH, OW, O]."""
        case, out = self.case, self.output
        n, outputs = len(case.x), len(case.weight)
        shape = (n, *case.out_size, outputs)
        if out.channels_first:
            shape = (n, outputs, *case.out_size)
        dtype: Any = {"accumulators": np.int32, "bytes": np.uint8, "float": np.float32}[out.kind]
        if out.halo != (0, 0):
            dtype = np.float32
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        memory = memory[-memory.ctypes.data % 4 :]  # aligned for four-byte values
        y = memory[GUARD : GUARD + size].view(dtype).reshape(shape)
        x = np.ascontiguousarray(case.x, dtype=np.float32)
        arrays = [(self.x, x), (self.y, y.view(np.float32) if out.kind == "accumulators" else y)]
        if out.residual is not None:
            r = out.residual
            if r.dtype.kind != "f":
                r = (r + (128 if out.residual_signed else 0)).astype(np.uint8)
            elif out.channels_first:
                r = r.transpose(0, 3, 1, 2)
            arrays.append((self.residual, np.ascontiguousarray(r)))
        if self.dirt:
            arrays.append((self.dirt_x, np.full((n, 6, 6, 24), 201, np.uint8)))
            arrays.append((self.dirt_y, np.empty((n, 6, 6, 40), np.float32)))
        assert self.native.run(arrays, n, index) == 0
        assert (memory[:GUARD] == 0xA5).all() and (memory[GUARD + size :] == 0xA5).all(), (
            "written outside of the output"
        )
        if out.channels_first:
            y = y.transpose(0, 2, 3, 1)
        if y.dtype == np.float32:
            return y
        return y.astype(np.int64) - (128 if out.kind == "bytes" and out.signed else 0)

    def counters(self) -> dict[str, tuple[int, int, int, int]]:
        """Kernel to (low MACs, high MACs, multiplications, runs) of the layer."""
        return {k: tuple(v) for name, k, *v in self.native.counters() if name == "layer"}  # type: ignore[misc]


# ---- random layers ---------------------------------------------------------------------------------------------------------

# (amax, wmax, signed): 4 bits, the ranges that the design notes name, edges of exactness, and other widths
LIMITS = [
    (15, 7, False), (15, 7, False), (7, 7, True), (15, 10, False), (31, 7, False), (31, 14, False), (63, 14, False),
    (63, 63, False), (64, 63, False), (64, 64, False), (63, 64, True), (64, 64, True), (12, 10, True), (31, 31, True),
    (32, 16, True), (3, 1, False), (1, 1, True), (127, 63, False), (255, 127, False), (127, 127, True), (126, 1, False),
    (15, 14, False), (15, 15, False), (30, 8, False), (16, 127, False), (32, 127, False), (100, 27, False),
]  # fmt: skip


def group_bounds(per: int, size: int, conv_groups: int) -> npt.NDArray[np.int32]:
    """Groups of `size` channels inside every convolution group; the last of each may be short."""
    starts = [g * per + s for g in range(conv_groups) for s in range(0, per, size)]
    return np.array([*starts, per * conv_groups], np.int32)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int, kind: str, axis: int) -> Ints:
    """Integers in low..high in one of several patterns; `axis` is that of the channels; H and W are the last two."""
    ends = np.array([low, high] if low < 0 else [0, high])
    if kind == "zero":
        return np.zeros(shape, np.int64)
    if kind == "top":
        return np.full(shape, high, np.int64)
    if kind == "bottom":
        return np.full(shape, low, np.int64)
    if kind == "ends":
        return rng.choice(ends, shape)
    if (
        kind == "checker"
    ):  # extremes of the Winograd transforms: squares of `step` pixels, each channel with its own phase
        step = int(rng.integers(1, 3))
        y, x = np.ogrid[: shape[-2], : shape[-1]]
        phase = rng.integers(0, 2 * step, (2, *shape[:-2], 1, 1))
        return ends[((y + phase[0]) // step + (x + phase[1]) // step) % 2]
    values = rng.integers(low, high + 1, shape)
    if kind == "reach":  # channels of differing range
        reach = rng.choice([0, 1, 7, 15, 28, 31, 64, 127, high], [d if i == axis else 1 for i, d in enumerate(shape)])
        values = np.sign(values) * (np.abs(values) % (reach + 1))
    elif kind == "groups":  # some channels zero, some saturated
        pick = rng.integers(0, 4, [d if i == axis else 1 for i, d in enumerate(shape)])
        values = np.where(pick == 0, 0, np.where(pick == 1, high, np.where(pick == 2, low, values)))
    return values.astype(np.int64)


LOW_KINDS = ("any", "ends", "top", "groups")
KINDS = ("any", "any", "reach", "groups", "ends", "checker", "top", "bottom", "zero")


def make_case(
    rng: np.random.Generator,
    *,
    batch: int = 1,
    per: int = 16,
    rows: int = 16,
    size: tuple[int, int] = (6, 6),
    kernel: tuple[int, int] = (3, 3),
    group: int = 16,
    conv_groups: int = 1,
    limits: tuple[int, int, bool] = (15, 7, False),
    by_output: bool = False,
    x_kind: str = "any",
    w_kind: str = "any",
    low_kind: str | None = None,
    **geometry: Any,
) -> LayerCase:
    """A layer of per * conv_groups channels and rows * conv_groups outputs. by_output: weight shifts differ by output.
    low_kind: pattern of low weights that are integers of their own; None: they are derived."""
    amax, wmax, signed = limits
    channels, outputs = per * conv_groups, rows * conv_groups
    bounds = group_bounds(per, group, conv_groups)
    n_groups = len(bounds) - 1
    n_local = n_groups // conv_groups
    # the largest shifts at which a value read back still fits its byte
    top = (7 if signed else 8) - amax.bit_length()
    activation_shift = rng.integers(0, top + 1, n_groups).astype(np.uint8)
    weight_shift = rng.integers(0, 8 - wmax.bit_length(), (conv_groups, n_local)).astype(np.uint8)
    weight_shift = np.repeat(weight_shift, rows, axis=0)
    if by_output:
        weight_shift = rng.integers(0, 8 - wmax.bit_length(), (outputs, n_local)).astype(np.uint8)
    low = rng.random((len(RATIOS), n_groups)) < 0.5
    low[0], low[-1] = False, True
    low[1] = rng.permutation(n_groups) < max(1, n_groups // 3)
    low[2] = np.arange(n_groups) % n_local < rng.integers(0, n_local + 1)  # a prefix
    if conv_groups > 1:  # all of some convolution groups and none of the others, often without the first
        some = rng.random(conv_groups) < 0.5
        some[0] &= bool(rng.integers(2))
        low[3] = np.repeat(some, n_local)
    x = random_values(rng, (batch, channels, *size), -127 if signed else 0, 127 if signed else 255, x_kind, 1)
    weight = random_values(rng, (outputs, per, *kernel), -127, 127, w_kind, 1).astype(np.int8)
    bias = rng.integers(-(2**20), 2**20, (len(RATIOS), outputs)).astype(np.int32)
    plane = None
    if low_kind is not None:
        plane = random_values(rng, weight.shape, -wmax, wmax, low_kind, 1).astype(np.int8)
    return LayerCase(
        x,
        weight,
        bounds,
        activation_shift,
        weight_shift,
        low,
        bias,
        amax,
        wmax,
        signed,
        conv_groups=conv_groups,
        low_weight=plane,
        **geometry,
    )


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int, bool]:
    """Low ranges: the listed ones, and pairs on either side of the edge of the fast inner product."""
    if draw(st.integers(0, 3)):
        return draw(st.sampled_from(LIMITS))
    amax = draw(st.integers(1, 126))
    return amax, min(127, draw(st.sampled_from([127 - amax, 128 - amax]))), draw(st.booleans())


@st.composite
def layer_cases(draw: st.DrawFn, most_macs: int = 1_500_000) -> LayerCase:
    """Ragged layers. Sizes shrink until the layer has at most `most_macs` multiply-accumulates."""
    side = st.integers(1, 5)
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (3, 3), (1, 1), (1, 1), None])) or (draw(side), draw(side))
    often_one = st.sampled_from([1, 1, 1, 1, 2, 3])
    stride = (draw(often_one),) * 2 if draw(st.booleans()) else (1, 1)
    if draw(st.integers(0, 5)) == 0:
        stride = (draw(often_one), draw(often_one))
    dilation = (draw(often_one), draw(often_one)) if draw(st.integers(0, 5)) == 0 else (1, 1)
    pad = draw(st.sampled_from([(1, 1), (0, 0), None])) or (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    if kernel == (1, 1) and draw(st.booleans()):
        pad = (0, 0)
    conv_groups = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 7]))
    per = draw(st.integers(1, {1: 80, 7: 12}.get(conv_groups, 40)))
    rows = draw(st.integers(1, {1: 140, 7: 20}.get(conv_groups, 70)))
    batch, h, w = draw(st.integers(1, 3)), draw(st.integers(1, 11)), draw(st.integers(1, 11))
    least = [dil * (k - 1) + 1 - 2 * p for k, p, dil in zip(kernel, pad, dilation, strict=True)]
    h, w = max(h, least[0]), max(w, least[1])
    area = -(-h // stride[0]) * -(-w // stride[1])
    while batch * area * per * rows * conv_groups * kernel[0] * kernel[1] > most_macs and rows > 1:
        if batch > 1:
            batch -= 1
        elif per > 40:
            per = per * 2 // 3
        else:
            rows = -(-rows // 2)
    return make_case(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))), batch=batch, per=per, rows=rows, size=(h, w), kernel=kernel,
        group=draw(st.sampled_from([4, 8, 8, 16, 16, 32])), conv_groups=conv_groups, limits=draw(limits()),
        by_output=draw(st.integers(0, 7)) == 0, x_kind=draw(st.sampled_from(KINDS)), w_kind=draw(st.sampled_from(KINDS)),
        low_kind=draw(st.sampled_from([None, *LOW_KINDS])), dynamic=draw(st.sampled_from([False, False, True])),
        stride=stride, pad=pad, dilation=dilation, halo=(draw(st.integers(0, 1)), draw(st.integers(0, 1))),
    )  # fmt: skip
