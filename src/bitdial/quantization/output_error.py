"""Shifts of least squared OUTPUT error, from samples of a layer's inputs. Pure NumPy functions.

Choosing shifts by the error of the values themselves clips too much: clipping errors all point towards zero and add up
over taps and channels that fire together, while rounding errors cancel. Measured in outputs, with the covariance of the
inputs, both count as what they cost (design notes, section 1, ask for least squared error; taking it in outputs is ours).

Notation per group: P [n, m] samples of the inputs of m = channels * taps weights, P_low the same read back from low
precision, w8 and w_low [O, m]. Where the bias table restores means, samples are centred first: only variance counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.quantization.effective_bits import naive_shift, read_back_table
from bitdial.quantization.program import BLOCK_ROWS, QuantizedLayer, WeightGranularity

Floats = npt.NDArray[np.float32]


@dataclass
class LayerSamples:
    """A layer with samples of its inputs: patches int16 [n, C, taps]; signed activations or not; centre the samples."""

    layer: QuantizedLayer
    patches: npt.NDArray[np.int16]
    signed: bool
    centred: bool

    def group(self, index: int) -> npt.NDArray[np.int16]:
        """int16 [n, channels * taps] of one group."""
        a, b = self.layer.group_bounds[index : index + 2]
        return self.patches[:, a:b].reshape(len(self.patches), -1)

    def weights(self, index: int) -> npt.NDArray[np.int16]:
        """int16 [rows, channels * taps]: the weights that meet this group (rows of its convolution group)."""
        assert self.layer.weight is not None
        n_local = self.layer.weight_shift.shape[1]
        per_group = self.layer.weight.shape[1]
        offset = (index // n_local) * per_group
        a, b = self.layer.group_bounds[index : index + 2] - offset
        block = self.layer.weight[self.rows(index), a:b]
        return block.reshape(block.shape[0], -1).astype(np.int16)

    def rows(self, index: int) -> slice:
        """Output channels of the convolution group that a group belongs to."""
        assert self.layer.weight is not None
        n_local = self.layer.weight_shift.shape[1]
        size = self.layer.weight.shape[0] // self.layer.conv_groups
        start = (index // n_local) * size
        return slice(start, start + size)

    def low_inputs(self, index: int, shift: int) -> npt.NDArray[np.int16]:
        """int16 [n, channels * taps]: the inputs of one group read back from low precision."""
        return read_back_table(shift, self.layer.amax, self.signed)[self.group(index) + 128]

    def low_weights(self, index: int, shift: int) -> npt.NDArray[np.int16]:
        """int16 [rows, channels * taps]: the weights of one group read back from low precision."""
        return read_back_table(shift, self.layer.wmax)[self.weights(index) + 128]

    def prepare(self, samples: npt.NDArray[np.int16]) -> Floats:
        x = samples.astype(np.float32)
        return x - x.mean(axis=0) if self.centred else x


def activation_shifts(readers: Sequence[LayerSamples]) -> npt.NDArray[np.uint8]:
    """uint8 [n_groups]: one shift per group of a tensor, for all layers that read it together (8-bit weights).

    Groups are taken in order and each shift is chosen for the error that the groups before it have left.
    """
    layer = readers[0].layer
    shifts = range(naive_shift(readers[0].signed, layer.amax) + 1)
    result = np.zeros(layer.n_groups, np.uint8)
    residuals: list[Floats] = [np.zeros(0, np.float32)] * len(readers)
    for g in range(layer.n_groups):
        costs = np.zeros(len(shifts))
        errors: list[list[Floats]] = []
        for i, own in enumerate(readers):
            scale = own.layer.weight_scale[own.rows(g)]
            w = own.weights(g).T * scale  # real units
            samples = own.group(g)
            found = [own.prepare(own.low_inputs(g, s) - samples) @ w for s in shifts]
            if g % own.layer.weight_shift.shape[1] == 0:
                residuals[i] = np.zeros_like(found[0])
            costs += [float(np.square(residuals[i] + e).sum(dtype=np.float64)) / len(e) for e in found]
            errors.append(found)
        result[g] = int(np.argmin(costs))
        residuals = [r + found[result[g]] for r, found in zip(residuals, errors, strict=True)]
    return result


def weight_shifts(
    samples: LayerSamples, granularity: WeightGranularity
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Shifts uint8 [O, n_local] given the layer's activation shifts, and the output error float64 [n_groups] (real units,
    summed over outputs) that lowering each group alone then causes, activations and weights together.

    Groups are taken in order, and each shift is chosen for the error that the groups before it have left: an error that
    cancels theirs is worth more than a small one, and clipping in every group would add up.
    """
    layer = samples.layer
    assert layer.weight is not None
    n_local = layer.weight_shift.shape[1]
    shifts = range(naive_shift(True, layer.wmax) + 1)
    unit = layer.weight_scale.astype(np.float64) ** 2
    result = np.zeros((layer.weight.shape[0], n_local), np.uint8)
    scores = np.zeros(layer.n_groups)
    residual: Floats = np.zeros(0, np.float32)
    for g in range(layer.n_groups):
        rows = samples.rows(g)
        x = samples.group(g)
        p = samples.prepare(x)
        p_low = samples.prepare(samples.low_inputs(g, int(layer.activation_shift[g])))
        w = samples.weights(g)
        exact = p @ w.T.astype(np.float32)  # [n, rows]
        if g % n_local == 0:
            residual = np.zeros_like(exact)
        candidates = [exact - p_low @ samples.low_weights(g, s).T.astype(np.float32) for s in shifts]
        costs = np.stack([np.einsum("no,no->o", residual + e, residual + e, dtype=np.float64) for e in candidates])
        costs *= unit[rows] / len(p)
        chosen = np.argmin(tie(costs[:, :, None], granularity)[:, :, 0], axis=0)
        result[rows, g % n_local] = chosen
        error = np.stack(candidates)[chosen, :, np.arange(len(chosen))].T
        scores[g] = float((np.einsum("no,no->o", error, error, dtype=np.float64) * unit[rows]).sum()) / len(p)
        residual = residual + error
    return result, scores


def tie(values: npt.NDArray[np.float64], granularity: WeightGranularity) -> npt.NDArray[np.float64]:
    """Sum [.., O, n] over the output channels that share a shift, and spread the sums back over them."""
    rows = values.shape[1]
    if granularity == "output":
        return values
    starts = np.arange(0, rows, BLOCK_ROWS if granularity == "block" else rows)
    sums = np.add.reduceat(values, starts, axis=1)
    return np.repeat(sums, np.diff([*starts, rows]), axis=1)
