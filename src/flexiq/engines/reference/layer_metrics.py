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

from flexiq.engines.reference.executor import Executor
from flexiq.engines.reference.patches import patch_rows
from flexiq.graph.interpreter import run_graph
from flexiq.graph.ir import Graph, Node
from flexiq.quantization.calibration import TensorStatistics
from flexiq.quantization.program import Program

Floats = npt.NDArray[np.float32]
Batches = Sequence[Sequence[Tensor]]


@dataclass
class FloatRun:
    """What the float run leaves behind.

    statistics   value -> range statistics
    patches      conv or linear layer -> float32 [rows, C, taps]: samples of its input, at most `rows` per layer
    values       value -> per batch float32 [places, channels]: samples of the value; `places` holds where
    axes         value -> its channel axis (1 or -1)
    """

    statistics: dict[str, TensorStatistics]
    axes: dict[str, int]
    patches: dict[str, Floats] = field(default_factory=dict)
    values: dict[str, list[Floats]] = field(default_factory=dict)
    places: dict[str, list[Tensor]] = field(default_factory=dict)


def rows_of(x: Tensor, axis: int) -> Tensor:
    """[places, channels]: a value with its channel axis last and the others flattened."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


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
    per_batch = max(1, -(-patch_count // max(1, len(batches))))

    def observe(name: str, x: Tensor) -> None:
        if name in statistics:
            statistics[name].update(x, name)
        for node in readers.get(name, []):
            assert node.weight is not None
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


def quantized_run(
    program: Program,
    ratio_index: int,
    batches: Batches,
    run: FloatRun,
    compared: Mapping[str, str],
    permutations: Mapping[str, npt.NDArray[np.int64] | None],
) -> dict[str, Noise]:
    """The second of the two runs: the quantized network, once over the same batches, compared with the first.

    compared: value of the program -> value of the float run that it stands for. permutations: old channel per new one, for
    values whose channels the layout moved. Returns the noise of every compared value.
    """
    executor = Executor(program)
    settings = executor.settings(ratio_index)
    result = {value: Noise() for value in compared}
    for number, batch in enumerate(batches):

        def observe(name: str, x: Tensor, number: int = number) -> None:
            source = compared.get(name)
            if source is None:
                return
            place = run.places[source][number]
            rows = rows_of(x, run.axes[source])[place].float().numpy()
            if name in program.qparams:
                rows = rows * np.float32(program.qparams[name].scale)
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
    return result
