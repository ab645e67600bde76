"""What the 8-bit model's own values look like on calibration data: the basis of shifts, scores and bias corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.engines.reference.walk import Batches, Walk, layer_inputs
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph, Node
from bitdial.quantization.byte_products import sample_sum
from bitdial.quantization.calibration import rows_of, spread
from bitdial.quantization.effective_bits import read_back
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import read_back_weights

COUNTED = 1 << 18  # values of a batch that go into histograms, all channels of some places


@dataclass
class ValueStatistics:
    """Integers of one 8-bit value that feeds a low-eligible layer.

    histogram   float64 [C, 256]: counts of q (unsigned) or q + 128 (signed) per feature channel, of evenly spaced places
    mean        float64: mean over samples, [C, *space] for conv inputs, [C] for linear inputs
    channel_max int64 [C]: largest magnitude seen
    """

    histogram: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    signed: bool
    channel_max: npt.NDArray[np.int64]

    def integers(self) -> npt.NDArray[np.int64]:
        return np.arange(-128, 128) if self.signed else np.arange(256)


class _Collector:
    def __init__(self, program: Program) -> None:
        self.axes: dict[str, int] = {}
        for name, layer in program.layers.items():
            if layer.weight is not None:
                self.axes[program.instruction(name).inputs[0]] = 1 if layer.kind == "conv" else -1
        self.program = program
        self.histograms: dict[str, npt.NDArray[np.float64]] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.largest: dict[str, npt.NDArray[np.int64]] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        axis = self.axes[name] % x.dim()
        channels = x.shape[axis]
        offset = 128 if self.program.qparams[name].signed else 0
        rows = rows_of(x, axis)
        top = rows.amax(dim=0).cpu().numpy().astype(np.int64)  # float32 or bytes
        largest = top if rows.dtype == torch.uint8 else np.maximum(top, -rows.amin(dim=0).cpu().numpy().astype(np.int64))
        self.largest[name] = np.maximum(self.largest.get(name, 0), largest)
        first = offset + 256 * torch.arange(channels, dtype=torch.int32, device=x.device)
        index = spread(rows, COUNTED).to(torch.int32) + first
        counts = torch.bincount(index.reshape(-1), minlength=256 * channels).reshape(channels, 256).cpu().numpy()
        total = sample_sum(x if axis == 1 and x.dim() > 2 else rows)
        if name in self.histograms:
            self.histograms[name] += counts
            self.sums[name] += total
        else:
            self.histograms[name] = counts.astype(np.float64)
            self.sums[name] = total
            self.counts[name] = 0
        self.counts[name] += x.shape[0] if total.dim() > 1 else x.numel() // channels


def collect(
    walk: Walk,
    batches: Batches,
    also: Callable[[str, Tensor], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, ValueStatistics]:
    """Run the 8-bit model (ratio index 0) over the batches.

    Returns statistics of every value that feeds a conv or linear layer. also: a further observer of these values. progress: told
    the share of the batches that are done.
    """
    collector = _Collector(walk.program)
    for number, batch in enumerate(batches):
        for value, x in layer_inputs(walk, batch):
            collector(value, x)
            if also is not None:
                also(value, x)
        if progress is not None:
            progress((number + 1) / len(batches))
    return {
        name: ValueStatistics(
            histogram,
            (collector.sums[name] / collector.counts[name]).cpu().numpy(),
            walk.program.qparams[name].signed,
            collector.largest[name],
        )
        for name, histogram in collector.histograms.items()
    }


def tap_means(node: Node, layer: QuantizedLayer, mean: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Mean over output positions of what each tap of the layer sees: ([C, taps] means, [taps] share inside the input)."""
    assert layer.weight is not None
    taps = layer.weight[0, 0].size if layer.kind == "conv" else 1
    image = torch.from_numpy(np.ascontiguousarray(mean))
    if layer.kind == "linear":
        return image.reshape(-1, 1), torch.ones(1, dtype=torch.float64)
    if image.dim() != 3:  # 1-D and 3-D convolutions: borders ignored
        return image.flatten(1).mean(dim=1, keepdim=True).expand(-1, taps), torch.ones(taps, dtype=torch.float64)
    a = node.attrs
    kernel = layer.weight.shape[2:]

    def unfold(x: Tensor) -> Tensor:
        columns = F.unfold(x[None], kernel, a["dilation"], a["padding"], a["stride"])[0]
        return columns.reshape(x.shape[0], taps, -1).mean(dim=2)

    return unfold(image), unfold(torch.ones(1, *image.shape[1:], dtype=torch.float64))[0]


def group_mean_shifts(node: Node, layer: QuantizedLayer, statistics: ValueStatistics) -> npt.NDArray[np.float64]:
    """float64 [n_groups, O]: how much extracting one group lowers each output's mean accumulator, to first order.

    Adding the rows of the low groups to the 8-bit bias restores the means (design notes, section 1, "bias per ratio").
    """
    assert layer.weight is not None
    means, inside = tap_means(node, layer, statistics.mean)
    q = statistics.integers()
    shift = layer.activation_shift[layer.channel_groups()]
    levels = np.stack([read_back(q, s, layer.amax, statistics.signed) for s in range(8)]).astype(np.float64)
    total = np.maximum(statistics.histogram.sum(axis=1), 1.0)
    change = ((statistics.histogram * (levels[shift] - q)).sum(axis=1)) / total  # mean of (low - eight) per channel
    extracted = means + torch.from_numpy(change)[:, None] * inside[None]
    n_local = layer.weight_shift.shape[1]
    low = read_back_weights(layer)
    outputs, per_group = layer.weight.shape[:2]
    w8 = layer.weight.reshape(outputs, per_group, -1).astype(np.float64)
    w4 = low.reshape(outputs, per_group, -1).astype(np.float64)
    rows = outputs // layer.conv_groups
    result = np.zeros((layer.n_groups, outputs))
    for g in range(layer.conv_groups):
        own = slice(g * per_group, (g + 1) * per_group)
        out = slice(g * rows, (g + 1) * rows)
        gain = (w8[out] * means[own].numpy() - w4[out] * extracted[own].numpy()).sum(axis=2)  # [rows, per_group]
        local = layer.group_bounds[g * n_local : (g + 1) * n_local].astype(np.int64) - g * per_group
        result[g * n_local : (g + 1) * n_local, out] = np.add.reduceat(gain, local, axis=1).T
    return result


class InputMeans:
    """Means over samples of what the conv and linear layers of a float network read: an observer of `run_graph`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers = {node.inputs[0]: node.op for node in graph.nodes if node.weight is not None}
        self.sums: dict[str, Tensor] = {}  # float64 [C, *space] of convolutions, [C] of linear layers
        self.counts: dict[str, int] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        if name not in self.readers:
            return
        rows = x if self.readers[name] == "conv" else x.reshape(-1, x.shape[-1])
        total = sample_sum(rows)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def reordered(self, graph: Graph, permutation: Callable[[str], npt.NDArray[np.int64] | None]) -> InputMeans:
        """Of the same network with channels in another order (old channel per new one; None: as they were)."""
        result = InputMeans(graph)
        result.counts = self.counts
        for name, total in self.sums.items():
            order = permutation(name)
            result.sums[name] = total if order is None else total[torch.from_numpy(order)]
        return result

    def outputs(self, layers: Sequence[str]) -> dict[str, npt.NDArray[np.float64]] | None:
        """float64 [O] per layer: mean of op(x) + bias, before residual and activation; None where a layer reads what was not
        seen."""
        nodes = [node for name in layers if (node := self.graph.node(name)).weight is not None]
        if not all(node.inputs[0] in self.sums for node in nodes):
            return None
        return {node.name: self._output(node) for node in nodes}

    def _output(self, node: Node) -> npt.NDArray[np.float64]:
        mean = self.sums[node.inputs[0]] / self.counts[node.inputs[0]]
        assert node.weight is not None
        weight = torch.from_numpy(self.graph.constants[node.weight]).double().to(mean.device)
        bias = self.graph.constants[node.bias].astype(np.float64) if node.bias is not None else 0.0
        if node.op == "linear":
            out = weight @ mean
        else:  # the mean of a convolution is the convolution of the mean
            a = node.attrs
            conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
            out = conv(mean[None], weight, None, a["stride"], a["padding"], a["dilation"], a["groups"])[0]
            out = out.flatten(1).mean(dim=1)
        result: npt.NDArray[np.float64] = out.cpu().numpy() + bias
        return result


def float_output_means(graph: Graph, layers: Sequence[str], batches: Batches) -> dict[str, npt.NDArray[np.float64]]:
    """float64 [O] per conv/linear layer: mean of op(x) + bias of the float model, before residual and activation."""
    means = InputMeans(graph)
    with torch.no_grad():
        for batch in batches:
            run_graph(graph, [channels_last(x) for x in batch], observe=means)
    return means.outputs(layers) or {}
