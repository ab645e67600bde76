"""Times one convolution or linear layer of a given shape with every exact kernel: the whole operation, as the engine runs it
(extraction, transforms, group shifts, prefix of low groups and rest of high ones, epilogue).

The figures choose defaults, fill the latency tables that the quantizer reads, and are what `benchmarks/cpu_kernels.py`
prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu import native
from bitdial.errors import EngineError
from bitdial.quantization.latency_table import LatencyTable, LayerShape, LayerTimes

MIXED = (0.25, 0.5, 0.75)
NARROW_NAMES = {"winograd": "winograd_narrow"}  # what the exactness rules call a kernel where sums are held in 16 bits


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """Normal numbers, quantized so that the largest of every output is 127."""
    w = rng.standard_normal(shape, dtype=np.float32).reshape(shape[0], -1)
    rounded: npt.NDArray[np.int8] = np.rint(w * (127 / np.abs(w).max(axis=1, keepdims=True))).astype(np.int8).reshape(shape)
    return rounded


class SingleLayer:
    """One layer as a program of the extension: quantize, layer. Normal random weights, as trained ones mostly are: on AVX2
    the speed depends on how many pairs of them have large sums.

    shape: a conv over two dimensions or a linear layer. shares: low shares, one ratio each. group: feature channels per
    group. shift_steps: how many different activation shifts the groups have, rising from group to group as sorted channels
    do. granularity "output" gives every output channel weight shifts of its own.

    Raises EngineError for shapes that the extension does not compile.
    """

    def __init__(
        self,
        shape: LayerShape,
        isa: str,
        threads: int = 1,
        shares: Sequence[float] = (0.0, 1.0),
        group: int = 16,
        amax: int = 15,
        wmax: int = 7,
        signed: bool = False,
        shift_steps: int = 3,
        granularity: str = "group",
        seed: int = 0,
    ) -> None:
        if shape.op == "conv" and (len(shape.kernel) != 2 or shape.images != 1):
            raise EngineError(f"no kernel is timed for '{shape.key}'")
        module = native.extension()
        rng = np.random.default_rng(seed)
        self.shape, self.shares, self.names = shape, tuple(shares), list(module.METHODS)
        self.native: Any = module.Program(isa, threads, list(self.shares))
        linear = shape.op == "linear"
        kernel = (1, 1) if linear else shape.kernel
        height, width = (1, shape.in_size[0]) if linear else shape.in_size
        out_height, out_width = (1, shape.out_size[0]) if linear else shape.out_size
        self.input_size, self.output_size = (height, width), (out_height, out_width)
        inputs, outputs, groups = shape.in_channels, shape.out_channels, shape.groups
        per = inputs // groups
        edges = np.minimum(np.arange(0, per + group, group), per)
        bounds = np.unique(np.concatenate([edges + g * per for g in range(groups)])).astype(np.int32)
        n = len(bounds) - 1
        local = n // groups
        weight = _weights(rng, (outputs, per, *kernel))
        bits, top = wmax.bit_length(), (7 if signed else 8) - amax.bit_length()
        steps = np.arange(local) * shift_steps // max(1, local)
        weight_shift = np.full((outputs, local), 7 - bits, dtype=np.uint8)
        if granularity == "output":
            weight_shift = rng.integers(max(0, 5 - bits), 8 - bits, (outputs, local)).astype(np.uint8)
        activation_shift = np.tile(np.clip(top - steps, 0, 7), groups).astype(np.uint8)
        low = np.zeros((len(self.shares), n), dtype=np.uint8)
        for i, share in enumerate(self.shares):
            low[i, np.arange(n) % local < round(share * local)] = 1
        pad = (0, 0) if linear else shape.padding
        self._x = self.native.add_tensor(
            h=height, w=width, c=inputs, is_float=True, channels_first=not linear, external=True
        )
        q = self.native.add_tensor(h=height, w=width, c=inputs, zero=128 if signed else 0, halo=tuple(pad))
        self._y = self.native.add_tensor(h=out_height, w=out_width, c=outputs, external=True)
        self.native.add_quantize("input", self._x, q, 1.0, -127.0 if signed else 0.0, 127.0 if signed else 255.0)
        self.native.add_conv(
            "layer", src=q, dst=self._y, lo=0.0, hi=255.0, weight=weight, stride=(1, 1) if linear else tuple(shape.stride),
            pad=tuple(pad), dilation=(1, 1) if linear else tuple(shape.dilation), conv_groups=groups, amax=amax, wmax=wmax,
            input_signed=signed, bounds=bounds, activation_shift=activation_shift, weight_shift=weight_shift, low=low,
            bias=np.zeros((len(self.shares), outputs), np.int32), multiplier=np.full(outputs, 1e-4, np.float32),
        )  # fmt: skip
        self._rng, self._floor = rng, -127 if signed else 0

    def unsupported(self, method: str) -> str:
        """ "" if the kernel is exact here, else why not."""
        return str(self.native.methods("layer")[self.names.index(method)])

    def prepare(self, batch: int) -> None:
        """Make inputs and outputs for a batch size."""
        self.batch = batch
        size = (batch, self.shape.in_channels, *self.input_size)
        self.x = self._rng.integers(self._floor, 128, size).astype(np.float32)
        self.y = np.zeros((batch, *self.output_size, self.shape.out_channels), dtype=np.uint8)

    def choose(self, share_index: int, method: str, chunk: int = 0) -> None:
        """Use a kernel at a share from now on."""
        self.native.choose("layer", share_index, self.names.index(method), chunk)
        self.native.finish(all=True)

    def seconds(self, share_index: int, repeats: int) -> list[float]:
        """Times of the layer alone, one per repetition."""
        arrays = [(self._x, self.x), (self._y, self.y)]
        return [self.native.profile(arrays, self.batch, share_index, 1)[1] for _ in range(repeats)]

    def chunks(self, share_index: int, method: str) -> list[int]:
        """Sizes of a pass that are worth trying with a kernel."""
        self.choose(share_index, method)
        base = int(self.native.choice("layer", share_index)[1])
        return sorted(
            {max(12, c // 12 * 12) for c in ((base // 2, base, base * 2) if "winograd" in method else (base,))}
        )

    def best(self, share_index: int, method: str, repeats: int) -> float:
        """Seconds per batch of a kernel at its best size of a pass: the least of the medians."""
        results = []
        for chunk in self.chunks(share_index, method):
            self.choose(share_index, method, chunk)
            self.seconds(share_index, 2)
            results.append(float(np.median(self.seconds(share_index, repeats))))
        return min(results)


def time_shape(shape: LayerShape, isa: str, threads: int, batch: int, repeats: int = 9) -> LayerTimes:
    """Seconds per sample of a shape with every kernel, all channels low, and of the best kernel at low shares in between."""
    layer = SingleLayer(shape, isa, threads, (0.0, *MIXED, 1.0))
    layer.prepare(batch)
    last = len(MIXED) + 1
    narrow = bool(native.extension().facts(isa)["narrow_is_faster"])
    seconds = {"direct": layer.best(0, "direct", repeats) / batch}
    usable = [m for m in layer.names if m != "direct" and not layer.unsupported(m) and (m != "narrow" or narrow)]
    for method in usable:
        name = NARROW_NAMES.get(method, method) if narrow else method
        seconds[name] = layer.best(last, method, repeats) / batch
    mixed = []
    for index, share in enumerate(MIXED, start=1):
        best = min(layer.best(index, method, repeats) for method in ["direct", *usable])
        mixed.append((share, best / batch))
    return LayerTimes(shape=shape, seconds=seconds, mixed=tuple(mixed))


def measure_table(
    shapes: Sequence[LayerShape],
    isa: str | None = None,
    threads: int = 1,
    batch: int = 8,
    repeats: int = 9,
    target: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> LatencyTable:
    """A latency table of this machine for the shapes (each once). progress: called with done, total, next key."""
    name = native.choose_isa(isa)
    unique = list({shape.key: shape for shape in shapes}.values())
    layers = {}
    for done, shape in enumerate(unique):
        if progress is not None:
            progress(done, len(unique), shape.key)
        layers[shape.key] = time_shape(shape, name, threads, batch, repeats)
    if progress is not None:
        progress(len(unique), len(unique), "")
    cpu = native.cpu_name()
    label = target or f"{cpu.lower().replace(' ', '-')}-{name}-{threads}t-b{batch}"
    return LatencyTable(target=label, cpu=cpu, isa=name, threads=threads, batch=batch, layers=layers)
