"""Weights in the order in which the kernels read them, and the tables that say what each step of a product multiplies.

The reduction of a layer is cut into chunks of 16 channels of one filter tap, and four chunks make a step. A step is high or low,
and all of its channels are low at the same ratios, so that every step is packed once, and a ratio is a list of steps. The low
steps of equal shift (activations' plus weights', per output) follow each other: their sum is shifted once, at the end of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.quantization.instructions import Window
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.weights import low_integers, read_back_weights

Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
STEP_BYTES, STEP_NIBBLES, STEP_LOW_BYTES = 0, 1, 2
CHUNK, CHUNKS = 16, 4  # channels of a chunk, chunks of a step
PITCH = 16  # bytes: a position's channels begin at a multiple of it, so that a chunk is one load
COLUMNS = 64  # outputs of a block, and what a layer's are padded to
ELEMENTS_PAY = 2  # times as many chunks of whole channels as of picked elements: then single loads are fewer


@dataclass
class PackedLayer:
    """A convolution or linear layer as the kernels take it.

    weights   bytes of every step, high and low
    steps     per ratio, int32 [steps, 4]: kind, halves used, first 16 bytes of the weights, row of `shifts` behind it or -1
    places    per ratio, int32 [steps, 4 chunks or 64 elements, 4]: dy, dx, channel (-1: none), `extraction_code`
    starts    per ratio, int32 [convolution groups + 1]: first step of each
    shifts    uint8 [rows, padded]: per output of a convolution group
    elements  places are of single elements
    limits    `limit_codes` of low activations
    outputs, padded   of one convolution group, and rounded up to whole blocks
    """

    weights: Bytes
    steps: list[Ints]
    places: list[Ints]
    starts: list[Ints]
    shifts: Bytes
    elements: bool
    outputs: int
    padded: int
    signed: bool
    limits: tuple[int, int]

    @property
    def kernel(self) -> str:
        return f"conv{'_elements' if self.elements else ''}_{'signed' if self.signed else 'unsigned'}"


@dataclass
class _Run:
    """Steps of one kind. low_at: per ratio, whether its channels are low. key: shifts per output (low), or None."""

    group: int
    low_at: tuple[bool, ...]
    key: bytes | None
    steps: list[tuple[int, int, int]]  # kind, halves, first 16 bytes
    places: Ints  # [steps, chunks or elements, 4]


def pitch(channels: int) -> int:
    """Bytes from one position's channels to the next one's."""
    return -(-channels // PITCH) * PITCH


def _halves(value: float) -> int:
    """The bits of a float16 number."""
    return int(np.float16(value).view(np.uint16))


def extraction_code(shift: int, signed: bool) -> int:
    """int32: scale and offset with which the kernels extract (csrc/cuda/extract.h), as float16 in its lower and upper half."""
    base, origin = (1536, 1152) if signed else (1024, 1024)
    return int(np.uint32(_halves(2.0**-shift) | _halves(base - origin * 2.0**-shift) << 16).astype(np.int32))


def limit_codes(amax: int, signed: bool) -> tuple[int, int]:
    """uint32 least and greatest low activation, each plus its base, as two float16 numbers."""
    base, least = (1536, -amax) if signed else (1024, 0)
    return _halves(base + least) * 0x10001, _halves(base + amax) * 0x10001


def low_kind(layer: QuantizedLayer, signed: bool, native: bool) -> int:
    """How low steps of a layer are stored. native: the tensor cores take 4-bit activations too."""
    assert layer.weight is not None
    reach = 7 if signed else 15
    depth = layer.weight.size // len(layer.weight)
    exact = depth * layer.amax * layer.wmax * 16 < 2**31  # unpacked nibbles are 16 times as large
    return STEP_NIBBLES if layer.wmax <= 7 and (layer.amax <= reach if native else exact) else STEP_LOW_BYTES


def pack_bytes(weight: npt.NDArray[np.int8]) -> Bytes:
    """[outputs, 64] of a step, in the order of the fragments of two m16n8k32 products: per 8 outputs, 512 bytes."""
    split = weight.reshape(-1, 8, 2, 2, 4, 4)  # tile, output, half, register, lane of four, byte
    return np.ascontiguousarray(split.transpose(0, 2, 1, 4, 3, 5)).view(np.uint8).reshape(-1)


def pack_nibbles(weight: npt.NDArray[np.int8], native: bool) -> Bytes:
    """[outputs, 64] of a step, in the order of the fragments of one m16n8k64 product: per 8 outputs, 256 bytes.

    native: channels 0 to 7 of a chunk share bytes with its channels 8 to 15, as activations do (`keep` in product.h). Otherwise
    the chunks 0 and 1 (2 and 3) share bytes: their halves are then the two registers of an 8-bit product.
    """
    split = weight.view(np.uint8) & 15
    if native:  # tile, output, register, chunk, half byte, word of the half, byte
        split = split.reshape(-1, 8, 2, 2, 2, 2, 4).swapaxes(3, 4)
    split = split.reshape(-1, 8, 2, 2, 4, 4)  # tile, output, register, half byte, lane of four, byte
    joined = (split[:, :, :, 0] | (split[:, :, :, 1] << 4)).astype(np.uint8)
    return np.ascontiguousarray(joined.transpose(0, 2, 1, 3, 4)).reshape(-1)


def unpack_bytes(packed: Bytes) -> npt.NDArray[np.int8]:
    """The inverse of `pack_bytes`: int8 [outputs, 64]."""
    return packed.view(np.int8).reshape(-1, 2, 8, 4, 2, 4).transpose(0, 2, 1, 4, 3, 5).reshape(-1, 64)


class Packer:
    """One use: `Packer(layer, window, signed, native).run()`.

    dynamic: the input comes with its low channels read back from low precision, so low steps are of bytes, of weights read back.
    """

    def __init__(self, layer: QuantizedLayer, window: Window, signed: bool, native: bool, dynamic: bool = False) -> None:
        assert layer.weight is not None
        self.layer, self.window, self.signed, self.dynamic, self.native = layer, window, signed, dynamic, native
        outputs, self.per = layer.weight.shape[:2]
        self.outputs = outputs // layer.conv_groups
        self.padded = -(-self.outputs // COLUMNS) * COLUMNS
        self.taps = int(np.prod(window.kernel))
        self.high = layer.weight.reshape(outputs, self.per, self.taps)
        self.any_low = bool(layer.n_groups and layer.low.any())
        low_weight = read_back_weights if dynamic else low_integers
        self.low = low_weight(layer).reshape(self.high.shape) if self.any_low else self.high
        self.kind = STEP_BYTES if dynamic else low_kind(layer, signed, native)
        self.blobs: list[Bytes] = []
        self.filled = 0

    def run(self) -> PackedLayer:
        layer = self.layer
        self.elements = self._elements_pay()
        runs = [run for group in range(layer.conv_groups) for run in self._runs_of(group)]
        keys = sorted({run.key for run in runs if run.key is not None})
        shifts = np.zeros((max(1, len(keys)), self.padded), np.uint8)
        for row, key in enumerate(keys):
            shifts[row, : self.outputs] = np.frombuffer(key, np.uint8)
        lists = [self._at_ratio(runs, keys, r) for r in range(len(layer.bias))]
        return PackedLayer(
            np.concatenate(self.blobs), [v[0] for v in lists], [v[1] for v in lists], [v[2] for v in lists], shifts,
            self.elements, self.outputs, self.padded, self.signed,
            limit_codes(layer.amax, self.signed),
        )  # fmt: skip

    # ---- which channels go together -----------------------------------------------------------------------------------------

    def _classes(self, group: int) -> list[tuple[tuple[bool, ...], bytes, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(when low, shifts per output, local channels, their activation shifts) of a convolution group."""
        layer = self.layer
        shift = np.zeros_like(layer.activation_shift) if self.dynamic else layer.activation_shift
        if not self.any_low:
            channels = np.arange(self.per)
            return [((False,) * len(layer.bias), b"", channels, np.zeros_like(channels))]
        local = layer.weight_shift.shape[1]
        rows = slice(group * self.outputs, (group + 1) * self.outputs)
        found: dict[tuple[tuple[bool, ...], bytes], list[int]] = {}
        for j in range(local):
            g = group * local + j
            when = tuple(bool(v) for v in layer.low[:, g])
            key = bytes(self.outputs)
            if not self.dynamic:
                key = (layer.weight_shift[rows, j] + shift[g]).astype(np.uint8).tobytes()
            found.setdefault((when, key if any(when) else b""), []).append(g)
        classes = []
        for (when, key), members in found.items():
            bounds = layer.group_bounds
            channels = np.concatenate([np.arange(bounds[g], bounds[g + 1]) for g in members]) - group * self.per
            shifts = np.concatenate([np.full(bounds[g + 1] - bounds[g], shift[g]) for g in members])
            classes.append((when, key, channels.astype(np.int64), shifts.astype(np.int64)))
        return classes

    def _elements_pay(self) -> bool:
        whole = picked = 0
        for group in range(self.layer.conv_groups):
            for _, _, channels, _ in self._classes(group):
                whole += len(np.unique((channels + group * self.per) // CHUNK)) * self.taps
                picked += -(-len(channels) * self.taps // CHUNK)
        return whole > ELEMENTS_PAY * picked

    def _runs_of(self, group: int) -> list[_Run]:
        classes = self._classes(group)
        runs = []
        for when in dict.fromkeys(c[0] for c in classes):
            own = [c for c in classes if c[0] == when]
            if not all(when):
                channels = np.concatenate([c[2] for c in own])
                runs.append(self._run(group, when, None, channels, np.zeros_like(channels)))
            if any(when):
                runs += [self._run(group, when, key, channels, shifts) for _, key, channels, shifts in own]
        return runs

    # ---- chunks and steps ---------------------------------------------------------------------------------------------------

    def _chunks(
        self, group: int, channels: npt.NDArray[np.int64], shifts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Ints]:
        """(tap, local channel or -1: both [chunks, 16]; places) of channels; those of a chunk have one activation shift."""
        taps, locals_, places = [], [], []
        dy, dx = self._offsets()
        for shift in np.unique(shifts):
            own = np.sort(channels[shifts == shift])
            if self.elements:
                tap, channel = (v.reshape(-1) for v in np.meshgrid(np.arange(self.taps), own, indexing="ij"))
                pad = -len(tap) % CHUNK
                tap = np.concatenate([tap, np.zeros(pad, np.int64)]).reshape(-1, CHUNK)
                channel = np.concatenate([channel, np.full(pad, -1)]).reshape(-1, CHUNK)
                place = np.where(channel < 0, -1, channel + group * self.per)
            else:
                blocks = np.unique((own + group * self.per) // CHUNK)
                inside = blocks[:, None] * CHUNK + np.arange(CHUNK) - group * self.per
                inside = np.where(np.isin(inside, own), inside, -1)
                tap = np.repeat(np.arange(self.taps), len(blocks))[:, None].repeat(CHUNK, axis=1)
                channel = np.tile(inside, (self.taps, 1))
                place = np.tile(blocks * CHUNK, self.taps)[:, None]
            at = tap[:, : place.shape[1]]
            places.append(np.stack([dy[at], dx[at], place, np.full_like(place, extraction_code(int(shift), self.signed))],
                                   axis=-1))  # fmt: skip
            taps.append(tap)
            locals_.append(channel)
        return np.concatenate(taps), np.concatenate(locals_), np.concatenate(places).astype(np.int32)

    def _offsets(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        (kh, kw), _, _, (dh, dw) = self.window.pairs
        y, x = np.meshgrid(np.arange(kh) * dh, np.arange(kw) * dw, indexing="ij")
        return y.reshape(-1), x.reshape(-1)

    def _run(
        self, group: int, when: tuple[bool, ...], key: bytes | None, channels: npt.NDArray[np.int64],
        shifts: npt.NDArray[np.int64],
    ) -> _Run:  # fmt: skip
        kind = STEP_BYTES if key is None else self.kind
        tap, channel, places = self._chunks(group, channels, shifts)
        source = (self.high if key is None else self.low)[group * self.outputs : (group + 1) * self.outputs]
        n_steps = -(-len(tap) // CHUNKS)
        weight = np.zeros((self.padded, n_steps * CHUNKS * CHUNK), np.int8)
        picked = source[:, np.maximum(channel, 0).reshape(-1), tap.reshape(-1)]
        weight[: self.outputs, : picked.shape[1]] = np.where(channel.reshape(-1) < 0, 0, picked)
        steps = []
        for i in range(n_steps):
            chunks = min(CHUNKS, len(tap) - i * CHUNKS)
            cut = np.ascontiguousarray(weight[:, i * 64 : (i + 1) * 64])
            blob = pack_nibbles(cut, self.native) if kind == STEP_NIBBLES else pack_bytes(cut)
            steps.append((kind, 2 if chunks > 2 else 1, self.filled // 16))
            self.blobs.append(blob)
            self.filled += len(blob)
        missing = n_steps * CHUNKS - len(tap)
        none = np.tile(np.array([0, 0, -1, 0], np.int32), (missing, places.shape[1], 1))
        places = np.concatenate([places, none]).reshape(n_steps, -1, 4)
        return _Run(group, when, key, steps, places)

    def _at_ratio(self, runs: Sequence[_Run], keys: list[bytes], ratio: int) -> tuple[Ints, Ints, Ints]:
        steps, places, starts = [], [], [0]
        for group in range(self.layer.conv_groups):
            own = [run for run in runs if run.group == group and run.low_at[ratio] == (run.key is not None)]
            own.sort(key=lambda run: (run.key is not None, run.key or b""))
            for run, following in zip(own, [*own[1:], None], strict=True):
                ends = run.key is not None and (following is None or following.key != run.key)
                row = keys.index(run.key) if run.key is not None and ends else -1
                steps += [[*s, row if s is run.steps[-1] else -1] for s in run.steps]
                places.append(run.places)
            starts.append(len(steps))
        return np.array(steps, np.int32), np.concatenate(places), np.array(starts, np.int32)
