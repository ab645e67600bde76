"""Shifts of least squared OUTPUT error, from samples of a layer's inputs. Pure functions.

Choosing shifts by the error of the values themselves clips too much: clipping errors all point towards zero and add up
over taps and channels that fire together, while rounding errors cancel. Measured in outputs, with the covariance of the
inputs, both count as what they cost (design notes, section 1, ask for least squared error; taking it in outputs is ours).

Notation per group: P [n, m] samples of the inputs of m = channels * taps weights, P_low the same read back from low
precision, w8 and w_low [O, m]. Where the bias table restores means, samples are centred first: only variance counts.

Errors of outputs are n * O numbers per shift and group, so they are made once per group, for the shift that was chosen.
The others are compared by |R + E|^2 - |R|^2 = 2 <R, E> + |E|^2 with E a product of something small: the residual R is
multiplied by the one factor that all shifts share, and |E|^2 is a quadratic form in m * m sums of products. Every term
is of the size of an error, so that nothing cancels; equal costs go to the smaller shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.program import BLOCK_ROWS, QuantizedLayer, WeightGranularity


@dataclass
class LayerSamples:
    """A layer with samples of its inputs: patches [n, C, taps], 8-bit integers or as int16; signed or not; centre the samples."""

    layer: QuantizedLayer
    patches: npt.NDArray[np.integer]
    signed: bool
    centred: bool

    @property
    def weight_size(self) -> int:
        """How many weights the layer has: what choosing its shifts costs, to a factor."""
        return 0 if self.layer.weight is None else self.layer.weight.size

    def thinned(self, rows: int) -> LayerSamples:
        """With at most `rows` of the samples, evenly spaced."""
        step = -(-len(self.patches) // rows)
        return replace(self, patches=self.patches[::step])

    def group(self, index: int) -> npt.NDArray[np.integer]:
        """[n, channels * taps] of one group."""
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

    def inputs(self, index: int) -> Tensor:
        """float32 [n, channels * taps]: the integers of one group."""
        return torch.from_numpy(self.group(index)).float()

    def low_inputs(self, x: Tensor, shifts: Sequence[int]) -> Tensor:
        """float32 [len(shifts), *x.shape]: inputs read back from low precision, at each shift."""
        return _read_back(x, shifts, self.layer.amax, self.signed)

    def low_weights(self, w: Tensor, shifts: Sequence[int]) -> Tensor:
        """float32 [len(shifts), *w.shape]: weights read back from low precision, at each shift."""
        return _read_back(w, shifts, self.layer.wmax, True)

    def centre(self, x: Tensor) -> Tensor:
        """Integers x [.., n, m] without their means over the samples, in place; as they are where means are not restored.

        Multiplied by n they are integers still, so that values which differ by a constant become equal to the bit: two shifts
        that lose the same must not be told apart by rounding.
        """
        n = x.shape[-2]
        total = x.sum(dim=-2, keepdim=True)  # exact below 2^24, for 65,536 samples
        return x.mul_(n).sub_(total).div_(n) if self.centred else x


def _read_back(x: Tensor, shifts: Sequence[int], limit: int, signed: bool) -> Tensor:
    """As `effective_bits.read_back`, exact in float32 too: powers of two, and torch rounds half to even."""
    step = torch.exp2(torch.tensor(shifts, dtype=torch.float32)).reshape(-1, *[1] * x.dim())
    return (x / step).round_().clamp_(-limit if signed else 0, limit).mul_(step)


def activation_shifts(readers: Sequence[LayerSamples]) -> npt.NDArray[np.uint8]:
    """uint8 [n_groups]: one shift per group of a tensor, for all layers that read it together (8-bit weights).

    Groups are taken in order and each shift is chosen for the error that the groups before it have left.
    """
    layer = readers[0].layer
    shifts = range(naive_shift(readers[0].signed, layer.amax) + 1)
    result = np.zeros(layer.n_groups, np.uint8)
    residuals = [torch.zeros(0)] * len(readers)
    for g in range(layer.n_groups):
        costs = torch.zeros(len(shifts), dtype=torch.float64)
        found: list[tuple[Tensor, Tensor]] = []
        for i, own in enumerate(readers):
            n_local = own.layer.weight_shift.shape[1]
            w = torch.from_numpy(own.weights(g) * own.layer.weight_scale[own.rows(g), None])  # real units
            x = own.inputs(g)
            change = own.centre(own.low_inputs(x, shifts).sub_(x))  # [shifts, n, m]
            if g % n_local == 0:
                residuals[i] = x.new_zeros(len(x), len(w))
            gain = change @ (w.T @ w)
            if g % n_local:
                gain += (residuals[i] @ w).mul_(2.0)
            costs += gain.mul_(change).sum(dim=1).double().sum(dim=1) / len(x)
            found.append((change, w))
        result[g] = best = int(costs.argmin())
        for residual, (change, w) in zip(residuals, found, strict=True):
            residual.addmm_(change[best], w.T)
    return result


def weight_shifts(
    samples: LayerSamples, granularity: WeightGranularity
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Shifts uint8 [O, n_local] given the layer's activation shifts, and the output error float64 [n_groups] (real units,
    summed over outputs) that extracting each group alone then causes, activations and weights together.

    Groups are taken in order, and each shift is chosen for the error that the groups before it have left: an error that
    cancels theirs is worth more than a small one, and clipping in every group would add up.

    The error of a group is P w8 - P_low w_low = (P - P_low) w8 + P_low (w8 - w_low).
    """
    layer = samples.layer
    assert layer.weight is not None
    n_local = layer.weight_shift.shape[1]
    shifts = range(naive_shift(True, layer.wmax) + 1)
    unit = layer.weight_scale.astype(np.float64) ** 2
    result = np.zeros((layer.weight.shape[0], n_local), np.uint8)
    scores = np.zeros(layer.n_groups)
    residual = torch.zeros(0)
    for g in range(layer.n_groups):
        rows = samples.rows(g)
        x = samples.inputs(g)
        w = torch.from_numpy(samples.weights(g)).float().T.contiguous()  # [m, rows]
        n, m = x.shape
        low = samples.low_inputs(x, [int(layer.activation_shift[g])])[0]
        parts = torch.cat([samples.centre(x.sub_(low)), samples.centre(low)], dim=1)
        change, low = parts[:, :m], parts[:, m:]
        products = parts.T @ parts
        lost = w - samples.low_weights(w, shifts)  # [shifts, m, rows]
        if g % n_local == 0:
            residual = x.new_zeros(n, w.shape[1])
        residual.addmm_(change, w)
        # one product per shift, all of one shape: equal operands then give equal sums
        gain = torch.bmm(products[m:, m:].expand(len(lost), m, m), lost).add_((low.T @ residual).mul_(2.0))
        costs = gain.mul_(lost).sum(dim=1).double().numpy() * (unit[rows] / n)
        chosen = np.argmin(tie(costs[:, :, None], granularity)[:, :, 0], axis=0)
        result[rows, g % n_local] = chosen
        taken = lost[torch.from_numpy(chosen), :, torch.arange(len(chosen))].T
        factors = torch.cat([w, taken])
        squares = (products @ factors).mul_(factors).sum(dim=0).double().numpy()
        scores[g] = max(0.0, float((squares * unit[rows]).sum())) / n
        residual.addmm_(low, taken)
    return result, scores


def tie(values: npt.NDArray[np.float64], granularity: WeightGranularity) -> npt.NDArray[np.float64]:
    """Sum [.., O, n] over the output channels that share a shift, and spread the sums back over them."""
    rows = values.shape[1]
    if granularity == "output":
        return values
    starts = np.arange(0, rows, BLOCK_ROWS if granularity == "block" else rows)
    sums = np.add.reduceat(values, starts, axis=1)
    return np.repeat(sums, np.diff([*starts, rows]), axis=1)
