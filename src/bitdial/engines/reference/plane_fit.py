"""Fits the low plane on calibration data, layer after layer, on the network as quantized so far.

The targets are the 8-bit model's sums at sampled rows (a row: all that one output position multiplies); the inputs are
taken at the same rows while the bias table walks through the quantized network (`correct_bias`), whose upstream layers are
low already as far as the ratio says. Source: design notes, section 1; sequential fitting of quantized networks is older
(among others Lybrand and Saab 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.patches import windows
from bitdial.engines.reference.walk import Batches, Walk, layer_inputs
from bitdial.graph.ir import Node
from bitdial.quantization.byte_products import int8_product, int8_products
from bitdial.quantization.low_plane import layer_outputs, present_weights, solve_groups
from bitdial.quantization.program import QuantizedLayer
from bitdial.quantization.weights import low_integers

ROWS = 16384  # per layer, over all batches
TARGET_BYTES = 384 << 20  # of the sums that are kept; fewer rows where this is reached


class SampledRows:
    """Rows of the im2col matrix of one conv or linear layer, at places that depend on seed and batch alone.

    Rows of one sample stay together, in the order of the samples: the last rows are of other samples than the first ones.
    """

    def __init__(self, node: Node, layer: QuantizedLayer, per_batch: int, seed: int) -> None:
        self.node, self.per_batch, self.seed = node, per_batch, seed
        assert layer.weight is not None
        self.kernel = layer.weight.shape[2:] if layer.kind == "conv" else None

    def _places(self, available: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch)
        return torch.randperm(available, generator=generator)[: self.per_batch].sort().values

    def __call__(self, x: Tensor, batch: int) -> Tensor:
        """[rows, C * taps] of the layer's input x in a batch (its number)."""
        if self.kernel is None:
            flat = x.reshape(-1, x.shape[-1])
            return flat[self._places(len(flat), batch)]
        return windows(x, self.node, self.kernel, partial(self._places, batch=batch)).flatten(1)


class PlaneFit:
    """The hook of `correct_bias` that solves groups when they first become low.

    walk: of a program whose shifts are set; its layers get planes. batches: calibration samples; `correct_bias` takes the same
    ones. centred: means are restored afterwards, so that they need not be fitted. counting: see `counting_rows`.
    """

    def __init__(
        self,
        walk: Walk,
        layers: Sequence[str],
        batches: Batches,
        *,
        centred: bool,
        seed: int = 0,
        counting: Mapping[str, float] | None = None,
    ) -> None:
        self.centred, self.counting = centred, counting or {}
        program = walk.program
        outputs = sum(len(w) for n in layers if (w := program.layers[n].weight) is not None)
        count = min(ROWS, TARGET_BYTES // max(1, 2 * outputs))
        per_batch = max(1, -(-count // max(1, len(batches))))
        self.rows = {
            n: SampledRows(program.instruction(n).as_node(), program.layers[n], per_batch, seed + i) for i, n in enumerate(layers)
        }
        self.targets = _eight_bit_sums(walk, self.rows, batches)
        self.fitted: dict[str, np.ndarray] = {}  # layer -> bool [n_groups]: groups with their final low weights

    def wanted(self, index: int, layer: QuantizedLayer) -> SampledRows | None:
        """What gives the rows that `solve` wants; None where ratio `index` is the first to make no group of the layer low."""
        return self.rows.get(layer.name) if self._new(index, layer).any() else None

    def _new(self, index: int, layer: QuantizedLayer) -> npt.NDArray[np.bool_]:
        new: npt.NDArray[np.bool_] = layer.low[index] & ~self.fitted.setdefault(layer.name, np.zeros(layer.n_groups, np.bool_))
        return new

    def solve(self, index: int, layer: QuantizedLayer, x: Tensor) -> None:
        """Solve the groups of a layer that ratio `index` is the first to make low. x: rows of its inputs, of all batches, as
        float32 or in bytes."""
        done, new = self.fitted[layer.name], self._new(index, layer)
        if layer.low_weight is None:
            layer.low_weight = low_integers(layer)
        present = _sums(layer, layer.low[index] & done, x)
        errors = self.targets[layer.name].float().sub_(present)
        if self.centred:
            errors.sub_(errors.mean(dim=0))
        solve_groups(layer, new, x, errors, centred=self.centred, counting=self.counting.get(layer.name, 1.0), left=False)
        done |= new
        if done.all():
            del self.targets[layer.name]  # no ratio needs them any more


def _eight_bit_sums(walk: Walk, rows: Mapping[str, SampledRows], batches: Batches) -> dict[str, Tensor]:
    """bfloat16 [rows, O] per layer: accumulators of the 8-bit model, at ratio index 0.

    bfloat16 halves what is kept; its rounding is 2^-9 of a value, far below an error of four bits.
    """
    readers: dict[str, list[QuantizedLayer]] = {}
    for name in rows:
        readers.setdefault(walk.program.instruction(name).inputs[0], []).append(walk.program.layers[name])
    none = {n: np.zeros(walk.program.layers[n].n_groups, np.bool_) for n in rows}
    found: dict[str, Tensor] = {}  # filled as the batches come: parts would have to be joined, at twice the memory
    filled = dict.fromkeys(rows, 0)
    for number, batch in enumerate(batches):
        for value, x in layer_inputs(walk, batch):
            for layer in readers.get(value, []):
                name = layer.name
                sums = _sums(layer, none[name], rows[name](x, number))
                if name not in found:  # the first batch is the largest
                    found[name] = sums.new_empty((len(sums) * len(batches), sums.shape[1]), dtype=torch.bfloat16)
                start, filled[name] = filled[name], filled[name] + len(sums)
                found[name][start : filled[name]] = sums
    return {name: own[: filled[name]] for name, own in found.items()}


def _sums(layer: QuantizedLayer, low: npt.NDArray[np.bool_], x: Tensor) -> Tensor:
    """float32 [n, O]: products of rows x, integers as float32 or in bytes, with the weights, the groups `low` read back."""
    weight = present_weights(layer, low)
    if layer.conv_groups == 1 and int8_products():
        return int8_product(x, weight).float()
    return layer_outputs(layer, weight, x.float())
