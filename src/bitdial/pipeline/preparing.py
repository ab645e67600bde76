"""The steps before any quantization: a model captured, calibrated and laid out. All pipelines begin with these.

model -> graph -> statistics of its values -> channels sorted into groups
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.engines.reference.influence import backward_samples, counting_rows
from bitdial.engines.reference.statistics import InputMeans, float_output_means
from bitdial.errors import CalibrationError
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph, samples_per_step
from bitdial.graph.onnx import OnnxNetwork
from bitdial.graph.passes import optimize
from bitdial.graph.verify import verify
from bitdial.layout import LayoutPlan, LayoutReport, apply_layout, plan_layout
from bitdial.pipeline.doubts import doubtful_inputs
from bitdial.pipeline.kept_memory import keeping_memory
from bitdial.pipeline.lengths import shorter_graphs
from bitdial.quantization.build import check_patterns, eligibility, statistics_plan
from bitdial.quantization.calibration import TensorStatistics, choose_range
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.domains import non_negative_values
from bitdial.quantization.equalize import equalize
from bitdial.quantization.lift import lift
from bitdial.quantization.smooth import smooth

COUNTING_SAMPLES = 32  # at least, of a backward pass
Progress = Callable[[str, float], None]  # (what is being done, share done 0..1)


def silent(stage: str, share: float) -> None:
    """The default progress callback."""


@dataclass
class Prepared:
    """A captured, calibrated and laid-out network: everything that does not depend on which groups are low."""

    graph: Graph
    statistics: dict[str, TensorStatistics]
    inputs: list[Tensor]
    layout: LayoutReport | None
    samples: int
    seconds: dict[str, float] = field(default_factory=dict)
    output_means: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # given to the user, and kept for the program's provenance
    shorter: dict[int, Graph] = field(default_factory=dict)  # the network for shorter sequences, laid out alike
    input_means: InputMeans | None = None  # of the calibration pass, in the order of channels that `graph` has
    _counting: dict[str, float] | None = None

    def batches(self, size: int, limit: int | None = None) -> list[list[Tensor]]:
        """Calibration samples in batches of at most `size`, fewer where values are large. They share the samples' memory."""
        n = self.samples if limit is None else min(limit, self.samples)
        size = samples_per_step(self.graph.types, size)
        return [[x[a : min(a + size, n)] for x in self.inputs] for a in range(0, n, size)]

    def float_means(self, layers: Sequence[str], batches: Sequence[Sequence[Tensor]]) -> dict[str, npt.NDArray[np.float64]]:
        """`float_output_means` of the network on batches of `batches`: of the calibration pass where it took the same samples."""
        seen, taken = self.input_means, sum(len(batch[0]) for batch in batches)
        if seen is not None and seen.graph is self.graph and taken == self.samples:
            self.input_means = None  # needed once
            if (found := seen.outputs(layers)) is not None:
                return found
        return float_output_means(self.graph, layers, batches)

    def counting_rows(self, size: int) -> dict[str, float]:
        """Layer -> share of the rows of the calibration samples that count; found at the first call, `size` samples at a time.

        COUNTING_SAMPLES of them, evenly spaced, tell it: 0.29 of MiniLM's rows, 0.28 of those of all 128 sentence pairs.
        """
        if self._counting is None:
            layers = [node.name for node in self.graph.nodes if node.weight is not None]
            inputs = [x[:: max(1, self.samples // COUNTING_SAMPLES)] for x in self.inputs]
            some = replace(self, inputs=inputs, samples=len(inputs[0]))
            self._counting = counting_rows(self.graph, layers, some.batches(backward_samples(self.graph, size)))
        return self._counting


@keeping_memory
def prepare(
    model: nn.Module | Graph,
    inputs: Sequence[Tensor],
    config: QuantizeConfig,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Capture, optimize, calibrate and lay out.

    inputs: calibration samples, one tensor per model input, batch first. names: keyword names of the inputs (dicts).
    """
    inputs = calibration_inputs(inputs)
    started = time.perf_counter()
    progress("capture", 0.0)
    def capture_with(samples: Sequence[Tensor]) -> Graph:
        found = optimize(captured(model, samples, names))
        check_patterns(found, config)
        return lift(found, config.ignored) if config.lift else found

    graph = capture_with(inputs)
    seconds = {"capture": time.perf_counter() - started}
    doubts = doubtful_inputs(graph.inputs, inputs)
    started = time.perf_counter()
    prepared = Prepared(graph, {}, inputs, None, inputs[0].shape[0], seconds, warnings=doubts)
    prepared.statistics = calibrate(prepared, config, progress)
    before = dict(prepared.statistics)
    if config.equalize is not None:
        prepared.graph, _ = equalize(graph, prepared.statistics, config.equalize)
        verify(prepared.graph)
        prepared.statistics = calibrate(prepared, config, progress)
    if config.smooth:
        smoothed, done = smooth(graph, prepared.statistics, config.smooth)
        if done:
            prepared.graph = smoothed
            verify(prepared.graph)
            prepared.statistics = calibrate(prepared, config, progress)
    seconds["calibrate"] = time.perf_counter() - started
    started = time.perf_counter()
    unsorted = dict(prepared.statistics)
    if config.sort_channels:
        lay_out(prepared, config)

    def again(cut: Sequence[Tensor]) -> Graph:
        """The network captured with other inputs, and changed by the same statistics."""
        own = capture_with(cut)
        if config.equalize is not None:
            own, _ = equalize(own, before, config.equalize)
        if config.smooth:
            own, _ = smooth(own, before, config.smooth)
        return apply_layout(own, layout_plan(own, unsorted, config))[0] if config.sort_channels else own

    prepared.shorter = shorter_graphs(prepared.graph, inputs, config.lengths, again)
    seconds["layout"] = time.perf_counter() - started
    return prepared


def calibration_inputs(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The calibration samples, one tensor per model input, on the CPU. Raises CalibrationError if they are empty or hold
    numbers that are not finite."""
    inputs = [x.detach().cpu() for x in inputs]
    if not inputs or inputs[0].dim() == 0 or inputs[0].shape[0] == 0:
        raise CalibrationError("the calibration data are empty: pass at least one sample (256 are usual)")
    for i, x in enumerate(inputs):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).reshape(len(x), -1).any(dim=1).nonzero()[0])
            raise CalibrationError(
                f"calibration input {i} holds NaN or infinity (first in sample {bad}): clean the data"
            )
    return inputs


def captured(model: nn.Module | Graph, inputs: Sequence[Tensor], names: Sequence[str] | None = None) -> Graph:
    """The graph of a model, as it is if it is one already. inputs: of `calibration_inputs`; names: their keyword names.

    Raises CaptureError.
    """
    if isinstance(model, Graph):
        return model
    example = [x[:2] for x in inputs]
    if isinstance(model, OnnxNetwork):
        return model.graph(example, names)
    return capture(model, (), dict(zip(names, example, strict=True))) if names else capture(model, example)


def calibrate(prepared: Prepared, config: QuantizeConfig, progress: Progress = silent) -> dict[str, TensorStatistics]:
    """One pass of the float network over the calibration samples."""
    statistics, means = statistics_plan(prepared.graph, config), InputMeans(prepared.graph)

    def observe(name: str, x: Tensor) -> None:
        if name in statistics:
            statistics[name].update(x, name)
        if config.bias_correction:
            means(name, x)

    constants = constant_tensors(prepared.graph)
    batches = prepared.batches(config.batch_size)
    with torch.no_grad():
        for i, batch in enumerate(batches):
            run_graph(prepared.graph, [channels_last(x) for x in batch], observe=observe, constants=constants)
            progress("calibrate", (i + 1) / len(batches))
    prepared.input_means = means
    return statistics


def layout_plan(graph: Graph, statistics: Mapping[str, TensorStatistics], config: QuantizeConfig) -> LayoutPlan:
    """The order of channels that sorts them by range into groups, for a float graph and its statistics."""
    reasons = eligibility(graph, config)
    non_negative = non_negative_values(graph)
    ranges = {}
    for node in graph.nodes:
        if node.name not in reasons or node.op == "matmul":
            continue
        own = statistics[node.inputs[0]]
        assert own.channel_max is not None
        levels = 255 if node.inputs[0] in non_negative else 127
        top = choose_range(own, levels, config.calibration, config.percentile)
        ranges[node.inputs[0]] = own.channel_max / max(top, 1e-30) * levels
    return plan_layout(graph, ranges, config.group_size, {name for name, reason in reasons.items() if not reason})


def lay_out(prepared: Prepared, config: QuantizeConfig) -> None:
    """Sort channels by range into groups and fold the permutation into the network and its statistics."""
    plan = layout_plan(prepared.graph, prepared.statistics, config)
    prepared.graph, prepared.layout = apply_layout(prepared.graph, plan)

    def order_along(name: str, axis: int) -> npt.NDArray[np.int64] | None:
        """The new order of a value's channels, None where they keep it or another axis moves."""
        permutation = plan.permutation(name)
        own = permutation is not None and plan.orders[name].axis == axis % len(prepared.graph.types[name].shape)
        return permutation if own else None

    for name, statistics in prepared.statistics.items():
        if statistics.channel_max is None or statistics.axis is None:
            continue
        permutation = order_along(name, statistics.axis)
        if permutation is not None:
            prepared.statistics[name] = statistics.permuted(permutation)
    if (means := prepared.input_means) is not None:
        axes = {name: 1 if op == "conv" else -1 for name, op in means.readers.items()}
        prepared.input_means = means.reordered(prepared.graph, lambda name: order_along(name, axes[name]))


__all__ = [
    "Prepared",
    "Progress",
    "calibrate",
    "calibration_inputs",
    "captured",
    "lay_out",
    "layout_plan",
    "prepare",
    "silent",
]
