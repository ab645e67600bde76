"""What 8-bit values and integer layers are: encodings, weights, groups, shifts and biases. NumPy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitdial.errors import GraphError

WeightGranularity = Literal["output", "block", "group"]
GRANULARITIES = ("output", "block", "group")
BLOCK_ROWS = 16  # output channels that share a weight shift under granularity "block"
MAX_MACS = 2**62


@dataclass(frozen=True)
class QParams:
    """Symmetric 8-bit encoding of a tensor: real value = scale * integer; zero point 0.

    scale: float32. signed: integers -127..127, else 0..255.
    """

    scale: float
    signed: bool

    @property
    def qmin(self) -> int:
        return -127 if self.signed else 0

    @property
    def qmax(self) -> int:
        return 127 if self.signed else 255


@dataclass
class QuantizedLayer:
    """One conv, linear or matmul in integers.

    `groups_of` below means the groups of feature channels (input channels) that share a shift; the layer's convolution
    groups are `conv_groups`. A matmul between activations has `weight is None` and is never low (n_groups = 0 rows below).

    name                 name of its instruction
    kind                 "conv" | "linear" | "matmul"
    weight               int8 [O, I / conv_groups, *kernel] (linear: [O, I]); None for matmul
    weight_scale         float32 [O]; s_w of DESIGN section 1 (matmul: empty)
    multiplier           float32 [O] (matmul: [1]); M: accumulator -> output units (8-bit steps, or real if output is float)
    residual_factor      float32; R: residual 8-bit steps -> output steps; for a float residual, added as it is
    eligible             may run low; `reason` says why not
    reason               "" or e.g. "first layer", "depthwise", "keep_8bit pattern 'head*'"
    amax, wmax           magnitude limits of low activations and weights (15 or 7, and 7, for 4 bits)
    group_bounds         int32 [n_groups + 1]; group g = feature channels group_bounds[g] .. group_bounds[g+1]-1 (consecutive);
                         no group crosses a border between convolution groups
    activation_shift     uint8 [n_groups]; static shifts (unused under dynamic extraction, kept all the same)
    weight_shift         uint8 [O, n_local]; n_local = groups per convolution group; column j of row o belongs to group
                         conv_group(o) * n_local + j. Always stored per output row here, whatever the granularity
    weight_granularity   how weight_shift was tied: "output" | "block" | "group"
    low_weight           int8, shape of weight, |.| <= wmax: low weights that are integers of their own, before their shift;
                         None: they are derived from the 8-bit ones. Use `weights.low_integers` and `read_back_weights`
    group_macs           int64 [n_groups]; multiply-accumulates per sample of each group
    low                  bool [n_ratios, n_groups]; low[r, g]: group g is low at ratio index r
    bias                 int32 [n_ratios, O]; bias table in the accumulator's scale, mean correction included
    accumulator_bound    int: max over outputs of |acc|, from the weights at hand (never reaches 2^31)
    """

    name: str
    kind: str
    weight: npt.NDArray[np.int8] | None
    weight_scale: npt.NDArray[np.float32]
    multiplier: npt.NDArray[np.float32]
    residual_factor: float
    eligible: bool
    reason: str
    amax: int
    wmax: int
    group_bounds: npt.NDArray[np.int32]
    activation_shift: npt.NDArray[np.uint8]
    weight_shift: npt.NDArray[np.uint8]
    weight_granularity: str
    group_macs: npt.NDArray[np.int64]
    low: npt.NDArray[np.bool_]
    bias: npt.NDArray[np.int32]
    conv_groups: int = 1
    accumulator_bound: int = 0
    macs: int = 0  # multiply-accumulates of the whole layer per sample
    low_weight: npt.NDArray[np.int8] | None = None

    @property
    def n_groups(self) -> int:
        return len(self.group_bounds) - 1 if self.weight is not None else 0

    def channel_groups(self) -> npt.NDArray[np.int64]:
        """int64 [feature channels]: group index of each feature channel."""
        return np.repeat(np.arange(self.n_groups), np.diff(self.group_bounds))

    def check(self) -> None:
        """Raise GraphError, naming the layer and the field, for what no layer can be: what a file from elsewhere may hold."""
        require = self._require
        require(self.weight_granularity in GRANULARITIES, f"unknown granularity {self.weight_granularity!r:.40}")
        require(0 <= self.accumulator_bound < 2**31, "accumulator_bound is not within int32")
        require(0 <= self.macs <= MAX_MACS, "macs is negative or too large")
        require(math.isfinite(self.residual_factor), "residual_factor is not finite")
        require(self.conv_groups >= 1, "conv_groups is not positive")
        require(self.low.ndim == 2 and self.bias.ndim == 2, "low or bias has no row per ratio")
        require(len(self.low) == len(self.bias), "low and bias are not of equally many ratios")
        outputs = 1
        if self.kind == "matmul":
            require(
                self.weight is None and not self.eligible and self.conv_groups == 1, "a matmul has weights or is eligible"
            )
            require(self.bias.shape[1] <= 1, "bias of a matmul is not [n_ratios, 0 or 1]")
            require(len(self.group_bounds) <= 1 and self.weight_shift.size == 0, "a matmul has groups")
            require(self.weight_scale.size == 0, "a matmul has weight scales")
            require(0 <= self.amax <= 255 and 0 <= self.wmax <= 127, "amax is not in 0..255 or wmax not in 0..127")
        else:
            outputs = self._check_weight()
            require(1 <= self.amax <= 255 and 1 <= self.wmax <= 127, "amax is not in 1..255 or wmax not in 1..127")
            self._check_groups()
        require(self.bias.dtype == np.int32, "bias is not int32")
        require(self.multiplier.shape == (outputs,), "multiplier has a wrong length")
        for field in ("weight_scale", "multiplier"):
            values: npt.NDArray[Any] = getattr(self, field)
            require(values.dtype == np.float32, f"{field} is not float32")
            require(np.isfinite(values).all() and (values >= 0).all(), f"{field} is not finite and non-negative everywhere")
        n, shift = self.n_groups, self.activation_shift
        require(self.low.shape[1] == n and self.low.dtype == np.bool_, "low is not bool [n_ratios, n_groups]")
        require(self.eligible or not self.low.any(), "groups are low although the layer is not eligible")
        require(shift.shape == (n,) and shift.dtype == np.uint8, "activation_shift is malformed")
        require(self.group_macs.shape == (n,) and self.group_macs.dtype == np.int64, "group_macs is malformed")
        require(not n or shift.max() <= 7, "an activation shift is above 7")
        require(not n or (self.group_macs.min() >= 0 and float(self.group_macs.sum(dtype=np.float64)) <= MAX_MACS),
                "group_macs is negative or too large")  # fmt: skip

    def _require(self, condition: object, problem: str) -> None:
        if not condition:
            raise GraphError(f"layer '{self.name:.80}': {problem}")

    def _check_weight(self) -> int:
        """The number of outputs."""
        require, weight = self._require, self.weight
        require(weight is not None, f"a {self.kind} has no weight")
        assert weight is not None
        rank = (2,) if self.kind == "linear" else (3, 4, 5)
        require(weight.ndim in rank and min(weight.shape) > 0, "the weight has a wrong or empty shape")
        outputs = len(weight)
        require(weight.dtype == np.int8, "the weight is not int8")
        require(int(weight.min()) >= -127, "a weight is -128; 8-bit weights are -127..127")
        require(self.kind == "conv" or self.conv_groups == 1, "a linear layer has convolution groups")
        require(outputs % self.conv_groups == 0, "the outputs do not divide into the convolution groups")
        require(self.bias.shape[1] == outputs, "bias is not [n_ratios, outputs]")
        require(self.weight_scale.shape == (outputs,), "weight_scale is not [outputs]")
        return outputs

    def _check_groups(self) -> None:
        assert self.weight is not None
        require, bounds, shift = self._require, self.group_bounds, self.weight_shift
        outputs, local = self.weight.shape[:2]
        require(bounds.ndim == 1 and bounds.dtype == np.int32 and len(bounds) >= 2, "group_bounds is malformed")
        require(bounds[0] == 0 and (np.diff(bounds.astype(np.int64)) > 0).all(), "group_bounds does not ascend from 0")
        require(int(bounds[-1]) == local * self.conv_groups, "group_bounds does not end with the feature channels")
        require(self.n_groups % self.conv_groups == 0, "the convolution groups differ in their number of groups")
        n_local = self.n_groups // self.conv_groups
        borders = np.arange(self.conv_groups, dtype=np.int64) * local
        require((bounds[:-1:n_local] == borders).all(), "a group crosses a border between convolution groups")
        cuts = np.diff(bounds).reshape(self.conv_groups, n_local)
        require((cuts == cuts[0]).all(), "the convolution groups are cut into groups differently")
        require(
            shift.shape == (outputs, n_local) and shift.dtype == np.uint8, "weight_shift is not uint8 [outputs, local groups]"
        )
        require(shift.max() <= 7, "a weight shift is above 7")
        if self.weight_granularity != "output":
            rows = np.arange(outputs)
            tie = rows // (outputs // self.conv_groups)
            if self.weight_granularity == "block":
                tie = np.stack([tie, rows // BLOCK_ROWS])
            same = np.atleast_2d(tie[..., 1:] == tie[..., :-1]).all(axis=0)
            require(
                (shift[1:][same] == shift[:-1][same]).all(), "weight_shift differs within rows that its granularity ties"
            )
