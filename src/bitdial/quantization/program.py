"""The quantized model as plain data: what selection fills in, the artifact stores and every engine runs. NumPy only.

A `Program` is a graph (see `bitdial.graph.ir`) whose values are 8-bit where `qparams` has an entry and float32 elsewhere,
plus one `QuantizedLayer` per conv, linear and matmul that runs in integers, plus the small float32 factors of the other
8-bit operators. Additional operators appear only here:

  quantize     float32 -> 8-bit: clamp(fl(x * inverse_scale)), rne          factor: inverse scale of the output
  dequantize   8-bit -> float32: fl(float(q) * scale)                       factor: scale of the input
  table        unary activation between 8-bit tensors: 256 entries, indexed by q (unsigned) or q + 128 (signed)

Factors (`factors[node]`, float32 vector) of the 8-bit operators; `fl` is one float32 rounding:
  add          [Ra, Rb]   t = fl(fl(float(a)*Ra) + fl(float(b)*Rb)); clamp; rne
  mul          [M]        t = fl(float(a*b) * M)                     (a*b exact in int32)
  concat       [R...]     per input: exactly 1.0 means copied, otherwise t = fl(float(q)*R); clamp; rne
  mean, avg_pool [F]      t = fl(float(sum) * F), sum exact in int32; avg_pool with differing window sizes stays float
  quantize, dequantize [as above]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitdial.graph.ir import Graph

Extraction = Literal["static", "dynamic", "naive"]
WeightGranularity = Literal["output", "block", "group"]
BLOCK_ROWS = 16  # output channels that share a weight shift under granularity "block"


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

    name                 node name in the program's graph
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


@dataclass
class Program:
    """A quantized network with its dial.

    ratios         ascending, ratios[0] == 0.0; the last is normally 1.0
    qparams        value name -> encoding, for every 8-bit value (graph inputs are float32)
    tables         node name of a `table` op -> uint8 or int8 [256]
    factors        node name -> float32 [..] (see module docstring)
    layers         node name -> QuantizedLayer, in graph order
    extraction     "static" | "dynamic" | "naive" (static with the top bits always)
    nested         low[r] is a subset of low[r+1] for every layer
    float_reasons  node name -> why it runs in float
    provenance     JSON-able: bitdial version, config, calibration summary, search statistics, seed
    curve          JSON-able rows measured on data: {"ratio", "accuracy", "agreement", ...}
    """

    graph: Graph
    ratios: list[float]
    qparams: dict[str, QParams]
    layers: dict[str, QuantizedLayer]
    tables: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    factors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    extraction: Extraction = "static"
    nested: bool = True
    float_reasons: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def low_share(self, ratio_index: int) -> float:
        """Share of all multiply-accumulates (eligible or not) that run low at a ratio."""
        total = sum(layer.macs for layer in self.layers.values())
        low = sum(
            int(layer.group_macs[layer.low[ratio_index]].sum()) for layer in self.layers.values() if layer.n_groups
        )
        return low / total if total else 0.0

    def eligible_share(self, ratio_index: int) -> float:
        """Share of the low-eligible multiply-accumulates that run low at a ratio (what the dial counts)."""
        eligible = [layer for layer in self.layers.values() if layer.eligible]
        total = sum(int(layer.group_macs.sum()) for layer in eligible)
        low = sum(int(layer.group_macs[layer.low[ratio_index]].sum()) for layer in eligible)
        return low / total if total else 0.0
