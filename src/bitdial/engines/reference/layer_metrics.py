"""What a layer-wise plan is made from, collected in two runs of the network over the calibration data.

Source: QuantuneV2 (arXiv 2501.07161): one run before and one after quantization give local metrics of every layer. The float
run is the calibration run too: ranges, samples of what every layer multiplies its weights with (for shifts, for means, for the
statistics of activations) and samples of values are taken on its way. The quantized run is compared with the samples of
values at the same places, so that no activation of the whole network is kept. Taking samples is ours; their number is a
setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.patches import patch_rows
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph, Node
from bitdial.quantization.calibration import TensorStatistics, rows_of
from bitdial.quantization.program import Program

Floats = npt.NDArray[np.float32]
Batches = Sequence[Sequence[Tensor]]


@dataclass
class FloatRun:
    """What the float run leaves behind.

    statistics   value -> range statistics
    patches      conv or linear layer -> float32 [rows, C, taps]: samples of its input, at most `rows` per layer
    values       value -> per batch float32 [places, channels]: samples of the value; `places` holds where
    axes         value -> its channel axis (1 or -1)
    draws        layer -> per batch the state of the generator before its patches were drawn: the quantized run draws patches
                 at the same places
    patch_count  rows per layer and batch, at most
    """

    statistics: dict[str, TensorStatistics]
    axes: dict[str, int]
    patches: dict[str, Floats] = field(default_factory=dict)
    values: dict[str, list[Floats]] = field(default_factory=dict)
    places: dict[str, list[Tensor]] = field(default_factory=dict)
    draws: dict[str, list[Tensor]] = field(default_factory=dict)
    patch_count: int = 0


def float_run(
    graph: Graph,
    batches: Batches,
    statistics: dict[str, TensorStatistics],
    axes: Mapping[str, int],
    *,
    patch_count: int,
    value_count: int,
    seed: int,
) -> FloatRun:
    """The first of the two runs: the float network, once over the batches.

    statistics: empty, for every value to calibrate; filled in place. axes: channel axis (1 or -1) of every value to sample.
    patch_count: rows per layer. value_count: numbers per value. Raises CalibrationError on values that are not finite.
    """
    result = FloatRun(statistics, dict(axes))
    generator = torch.Generator().manual_seed(seed)
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.weight is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    parts: dict[str, list[Tensor]] = {}
    per_batch = result.patch_count = max(1, -(-patch_count // max(1, len(batches))))

    def observe(name: str, x: Tensor) -> None:
        if name in statistics:
            statistics[name].update(x, name)
        for node in readers.get(name, []):
            assert node.weight is not None
            result.draws.setdefault(node.name, []).append(generator.get_state())
            rows = patch_rows(node, graph.constants[node.weight].shape, x, generator, per_batch)
            parts.setdefault(node.name, []).append(rows.float().clone())
        if name in axes:
            rows = rows_of(x, axes[name])
            count = max(1, value_count // max(1, len(batches) * rows.shape[1]))
            place = torch.randperm(rows.shape[0], generator=generator)[:count]
            result.places.setdefault(name, []).append(place)
            result.values.setdefault(name, []).append(rows[place].float().numpy())

    with torch.no_grad():
        for batch in batches:
            run_graph(graph, batch, observe=observe)
    result.patches = {name: torch.cat(p).numpy() for name, p in parts.items()}
    return result


@dataclass
class Noise:
    """Sums over the samples of one value: squares of the float values, squares of the differences, numbers compared."""

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    @property
    def ratio(self) -> float:
        """Noise over signal (the inverse of SQNR); 0 where both are 0."""
        return self.noise / self.signal if self.signal > 0.0 else float(self.noise > 0.0)

    @property
    def mean_square(self) -> float:
        return self.noise / self.count if self.count else 0.0


@dataclass(frozen=True)
class Carrier:
    """A layer that carries the noise of its input on to its output.

    node: in the float graph. weight: float32 [O, I, *kernel] in the program's order of channels. permutation: old channel per
    new one of its input, or None.
    """

    node: Node
    weight: Floats
    conv_groups: int
    permutation: npt.NDArray[np.int64] | None


class CarriedNoise:
    """What the weights of a layer make of the noise of its input, on the patches that the float run sampled."""

    def __init__(self, carrier: Carrier, run: FloatRun) -> None:
        self.carrier, self.run = carrier, run
        self.start, self.squares, self.count = 0, 0.0, 0
        self.generator = torch.Generator()

    def add(self, x: Tensor, number: int) -> None:
        """x: input of the layer in the quantized run, real values, of batch `number`."""
        c = self.carrier
        self.generator.set_state(self.run.draws[c.node.name][number])
        found = patch_rows(c.node, c.weight.shape, x, self.generator, self.run.patch_count).float().numpy()
        exact = self.run.patches[c.node.name][self.start : self.start + len(found)]
        self.start += len(found)
        noise = found - (exact if c.permutation is None else exact[:, c.permutation])
        carried = layer_outputs(c.weight, noise, c.conv_groups)
        self.squares += float(np.square(carried, dtype=np.float64).sum())
        self.count += carried.size

    @property
    def mean_square(self) -> float:
        """Per number of the output, before residual and activation."""
        return self.squares / self.count if self.count else 0.0


def layer_outputs(weight: Floats, patches: Floats, conv_groups: int) -> Floats:
    """float32 [conv_groups, rows, outputs per group]: products of weights and sampled inputs [rows, C, taps]."""
    inputs = patches.reshape(len(patches), conv_groups, -1).transpose(1, 0, 2)
    w = weight.reshape(conv_groups, len(weight) // conv_groups, -1).astype(np.float32, copy=False)
    result: Floats = np.matmul(inputs, w.transpose(0, 2, 1))
    return result


def quantized_run(
    program: Program,
    ratio_index: int,
    batches: Batches,
    run: FloatRun,
    compared: Mapping[str, str],
    permutations: Mapping[str, npt.NDArray[np.int64] | None],
    carriers: Mapping[str, Carrier],
) -> tuple[dict[str, Noise], dict[str, float]]:
    """The second of the two runs: the quantized network, once over the same batches, compared with the first.

    compared: value of the program -> value of the float run that it stands for. permutations: old channel per new one, for
    values whose channels the layout moved. carriers: layer of the program -> how it carries noise. Returns (noise of every
    compared value, mean square of the noise that a carrier makes of that of its input).
    """
    executor = Executor(program)
    settings = executor.settings(ratio_index)
    result = {value: Noise() for value in compared}
    carried = {name: CarriedNoise(carrier, run) for name, carrier in carriers.items()}
    readers: dict[str, list[CarriedNoise]] = {}
    for name, own in carried.items():
        readers.setdefault(program.instruction(name).inputs[0], []).append(own)
    for number, batch in enumerate(batches):

        def observe(name: str, x: Tensor, number: int = number) -> None:
            source, scale = compared.get(name), 1.0
            if source is None and name not in readers:
                return
            if name in program.qparams:
                scale = program.qparams[name].scale
            for reader in readers.get(name, []):
                reader.add(x.float() * scale, number)
            if source is None:
                return
            place = run.places[source][number]
            rows = rows_of(x, run.axes[source])[place].float().numpy() * np.float32(scale)
            exact = run.values[source][number]
            order = permutations.get(name)
            if order is not None:
                exact = exact[:, order]
            noise = result[name]
            noise.signal += float(np.square(exact, dtype=np.float64).sum())
            noise.noise += float(np.square(rows - exact, dtype=np.float64).sum())
            noise.count += exact.size

        with torch.no_grad():
            executor.run(batch, settings, observe=observe)
    return result, {name: own.mean_square for name, own in carried.items()}
