"""The two runs behind a layer-wise plan, and programs for any precision per layer made from them without further runs.

capture -> fold -> float run -> fuse, lay out, quantize -> quantized run -> evidence per layer -> (a plan) -> program

The float run goes over the folded but unfused graph: its values contain those of every legal fusion, so that ranges are
there whichever fusion is chosen in the end. Metrics are of the fused operators' outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitdial.engines.reference.layer_metrics import Carrier, FloatRun, Noise, float_run, layer_outputs, quantized_run
from bitdial.graph.bfloat16 import rounded, to_bits
from bitdial.graph.ir import Graph, Node
from bitdial.graph.passes import Choice, fold, fused
from bitdial.graph.passes.edit import drop_unused, fresh_constant
from bitdial.layout import LayoutReport, apply_layout, group_bounds
from bitdial.pipeline.doubts import doubtful_inputs
from bitdial.pipeline.noise_flow import gains_to_output, passing_share, samples_of
from bitdial.pipeline.preparing import Prepared, Progress, calibration_inputs, captured, layout_plan, silent
from bitdial.pipeline.quantizing import choose_shifts, restore_means
from bitdial.quantization.borders import BestFusion, best_fusion, with_precisions
from bitdial.quantization.build import build_program, check_patterns, eligibility, statistics_plan
from bitdial.quantization.calibration import TensorStatistics
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.effective_bits import read_back
from bitdial.quantization.output_error import LayerSamples
from bitdial.quantization.program import Program, QParams, QuantizedLayer
from bitdial.quantization.weights import INT32_LIMIT, read_back_weights
from bitdial.selection.layerwise import LayerEvidence, LayerwiseConfig

FLOATS = ("bfloat16", "float32")
PLANNED = "layer-wise plan"  # why a layer that could be low is not
Order = npt.NDArray[np.int64]


def quantize_config(config: LayerwiseConfig) -> QuantizeConfig:
    """What the parts below need to know, in their terms."""
    names = (
        "low_bits", "low_bits_weights", "group_size", "weight_granularity", "calibration", "percentile", "low_weights",
        "sort_channels", "lower_first_last", "lower_depthwise", "ignored", "calibration_images", "batch_size", "seed",
    )  # fmt: skip
    ratios = (0.0, 1.0) if "low" in config.precisions else (0.0,)
    return QuantizeConfig(ratios=ratios, **{name: getattr(config, name) for name in names})


@dataclass
class LowLayer:
    """What makes a layer low, for one encoding of its input: low weights, shifts, bound of the accumulators."""

    input: QParams
    low_weight: npt.NDArray[np.int8] | None
    activation_shift: npt.NDArray[np.uint8]
    weight_shift: npt.NDArray[np.uint8]
    accumulator_bound: int


@dataclass
class Variant:
    """One legal fusion of the network, laid out: a float graph with its statistics, all of it from the float run.

    origins: value of the fused graph -> value of the unfused one. orders: value -> old channel per new one. axes: value -> axis
    along which that order acts. irregular: values whose channels moved differently along other axes. low: what low layers need.
    """

    graph: Graph
    origins: dict[str, str]
    statistics: dict[str, TensorStatistics]
    orders: dict[str, Order]
    axes: dict[str, int]
    irregular: set[str]
    layout: LayoutReport | None
    low: dict[str, LowLayer] = field(default_factory=dict)


class Analysis:
    """A network with its two runs. `program(precisions)` makes programs from them.

    base: folded, unfused. evidence: per planned layer (conv and linear; products of activations stay at 8 bits). inferences:
    runs of the network so far, by name. seconds: of the steps. warnings: given to the user.
    """

    def __init__(self, base: Graph, inputs: Sequence[Tensor], config: LayerwiseConfig, progress: Progress = silent) -> None:
        self.base, self.inputs, self.config = base, list(inputs), config
        self.settings = quantize_config(config)
        self.samples = int(inputs[0].shape[0])
        self.inferences = {"float": 0, "quantized": 0, "finishing": 0}
        self.seconds: dict[str, float] = {}
        self.warnings = doubtful_inputs(base.inputs, self.inputs)
        self._variants: dict[tuple[tuple[str, str], ...] | None, Variant] = {}
        self._fusions: dict[frozenset[str], BestFusion] = {}
        check_patterns(base, self.settings)
        graph, origins = fused(base)
        self.reasons = eligibility(graph, self.settings)
        self.layers = [n.name for n in graph.nodes if n.name in self.reasons and n.weight is not None]
        self.run: FloatRun = self._timed("float run", lambda: self._float_run(graph, origins), progress)
        self.variant = self._timed("quantize", lambda: self._make_variant(graph, origins), progress)
        self.template = self._timed("shifts", self._make_template, progress)
        noise, carried = self._timed("quantized run", self._quantized_run, progress)
        self.evidence: list[LayerEvidence] = self._timed("score", lambda: self._evidence(noise, carried), progress)

    def _timed(self, stage: str, step: Callable[[], Any], progress: Progress) -> Any:
        progress(stage, 0.0)
        started = time.perf_counter()
        result = step()
        self.seconds[stage] = time.perf_counter() - started
        return result

    @property
    def batches(self) -> list[list[Tensor]]:
        size = self.config.batch_size
        return [[x[a : a + size] for x in self.inputs] for a in range(0, self.samples, size)]

    def possible(self, layer: str) -> tuple[str, ...]:
        """Precisions that a layer may take, ascending; int8 where it may not be low and nothing else is allowed."""
        own = tuple(p for p in self.config.precisions if p != "low" or not self.reasons[layer])
        return own or ("int8",)

    # -- the two runs --------------------------------------------------------------------------------------------------

    def _float_run(self, graph: Graph, origins: Mapping[str, str]) -> FloatRun:
        wanted = {origins[v]: s for v, s in statistics_plan(graph, self.settings).items()}
        if self._other_fusions():  # they have values that the default one does not keep
            for value, statistics in statistics_plan(self.base, self.settings).items():
                wanted.setdefault(value, statistics)
        axes: dict[str, int] = {}
        for value, axis in samples_of(graph, self.layers).items():
            if value in origins:
                axes.setdefault(origins[value], axis)
        self.inferences["float"] += 1
        return float_run(
            self.base, self.batches, wanted, axes,
            patch_count=self.config.patches, value_count=self.config.metric_values, seed=self.config.seed,
        )  # fmt: skip

    def _other_fusions(self) -> bool:
        """Whether a plan may end up with another fusion than the default one."""
        if self.config.fusion != "best":
            return self.config.fusion != "default"
        integers = self.best_fusion({})
        return bool(set(FLOATS) & set(self.config.precisions)) or integers.borders != integers.default

    def _quantized_run(self) -> tuple[dict[str, Noise], dict[str, float]]:
        """Noise of what was sampled in the float run, by value of the template; mean square of what each layer's weights make of
        the noise of its input."""
        compared, orders = {}, {}
        quantized_from = {n.name: n.inputs[0] for n in self.template.graph.nodes if n.op == "quantize"}
        for value in self.template.graph.types:
            own = quantized_from.get(value, value)
            source = self.variant.origins.get(own)
            if source not in self.run.axes or own in self.variant.irregular:
                continue
            rank = len(self.template.graph.types[value].shape)
            if own in self.variant.orders and self.variant.axes[own] % rank != self.run.axes[source] % rank:
                continue
            compared[value] = source
            orders[value] = self.variant.orders.get(own)
        carriers = {}
        for name in self.layers:
            node = self.variant.graph.node(name)
            assert node.weight is not None
            if self.template.graph.node(name).inputs[0] in compared:
                carriers[name] = Carrier(
                    self.base.node(name), self.variant.graph.constants[node.weight],
                    self.template.layers[name].conv_groups, self.variant.orders.get(node.inputs[0]),
                )  # fmt: skip
        self.inferences["quantized"] += 1
        return quantized_run(
            self.template, len(self.template.ratios) - 1, self.batches, self.run, compared, orders, carriers
        )

    # -- evidence ------------------------------------------------------------------------------------------------------

    def _evidence(self, noise: Mapping[str, Noise], carried: Mapping[str, float]) -> list[LayerEvidence]:
        operands = {n: self._operand_noise(self.variant.graph.node(n), self.template.layers[n]) for n in self.layers}
        propagated = self._propagated(noise, carried, {n: added for n, (_, _, added) in operands.items()})
        result = []
        for name in self.layers:
            node, layer = self.variant.graph.node(name), self.template.layers[name]
            possible = self.possible(name)
            weight, activation, added = operands[name]
            probe, output = self._probe(name), noise.get(name)
            before = noise.get(self.template.graph.node(name).inputs[0], Noise())
            assert layer.weight is not None
            result.append(
                LayerEvidence(
                    name=name, source=node.source, precisions=possible, weight_noise=weight, activation_noise=activation,
                    added_noise=added, propagated_noise=propagated[name], probe=probe, input_noise=before.ratio,
                    output_noise=weight[probe] + activation[probe] if output is None else output.ratio,
                    output_error=0.0 if output is None else output.mean_square,
                    parameters=layer.weight.size + len(layer.weight), macs=layer.macs,
                )  # fmt: skip
            )
        return result

    def _probe(self, layer: str) -> str:
        """The precision of a layer in the quantized run."""
        return "low" if bool(self.template.layers[layer].low[-1].any()) else "int8"

    def _propagated(
        self, noise: Mapping[str, Noise], carried: Mapping[str, float], added: Mapping[str, Mapping[str, float]]
    ) -> dict[str, dict[str, float]]:
        """Layer -> precision -> relative noise at the network's outputs that the layer alone causes.

        added: relative noise at its own output. A layer whose output could not be compared is taken to pass it on whole.
        """
        graph = self.template.graph
        variances, passing = {}, {}
        for name in self.layers:
            samples = self.run.values[self.variant.origins[name]]
            clipped = graph.node(name).attrs.get("activation") is not None
            passing[name] = passing_share(samples) if clipped else 1.0
            variances[name] = _variance(samples) * graph.types[name].elements * passing[name]
        own = {n: added[n][self._probe(n)] * variances[n] for n in self.layers}
        gains = gains_to_output(graph, noise, own, passing, carried)
        result = {}
        for name, losses in added.items():
            gain = gains.get(name, 0.0) * variances[name] if name in noise else 1.0
            result[name] = {precision: gain * loss for precision, loss in losses.items()}
        return result

    def _operand_noise(self, node: Node, layer: QuantizedLayer) -> tuple[dict[str, float], ...]:
        """By precision: relative squared error of a layer's weights; of its inputs; and what both together do to its output, over
        the variance of the output (fused, residual and activation included)."""
        assert node.weight is not None and layer.weight is not None
        w = self.variant.graph.constants[node.weight]
        q = self.template.qparams[self.template.graph.node(node.name).inputs[0]]
        patches = self._patches(self.variant, node)
        integers = quantized(patches, q)
        scale = layer.weight_scale.reshape(-1, *[1] * (w.ndim - 1))
        weights = {"float32": w, "bfloat16": rounded(w), "int8": layer.weight * scale}
        inputs = {"float32": patches, "bfloat16": rounded(patches), "int8": integers * np.float32(q.scale)}
        if layer.eligible and layer.n_groups and "low" in self.config.precisions:
            weights["low"] = read_back_weights(layer) * scale
            inputs["low"] = _low_input(layer, integers, q) * np.float32(q.scale)
        exact = layer_outputs(w, patches, layer.conv_groups)
        variance = _variance(self.run.values[self.variant.origins[node.name]])
        added = {}
        for precision, own in weights.items():
            error = layer_outputs(own, inputs[precision], layer.conv_groups) - exact
            added[precision] = float(error.var(axis=1, dtype=np.float64).mean()) / variance  # over samples: means are restored
        return (
            {p: _relative(w, own) for p, own in weights.items()},
            {p: _relative(patches, own) for p, own in inputs.items()},
            added,
        )

    def best_fusion(self, precisions: Mapping[str, str]) -> BestFusion:
        """The fusion with the fewest conversions for a plan; the same for all plans with the same layers in float."""
        floats = {n: p for n, p in precisions.items() if p in FLOATS}
        key = frozenset(floats)
        if key not in self._fusions:
            self._fusions[key] = best_fusion(self.base, floats, self.config.ignored)
        return self._fusions[key]

    # -- variants and programs -----------------------------------------------------------------------------------------

    def make_variant(self, choice: Choice | None) -> Variant:
        """A fusion of the network ("": an add of its own), None: unfused; laid out. No run of the network."""
        key = None if choice is None else tuple(sorted(choice.items()))
        if key not in self._variants:
            if choice is None:
                graph, origins = self.base, {v: v for v in (*self.base.inputs, *(n.name for n in self.base.nodes))}
            else:
                graph, origins = fused(self.base, choice)
            if str(fused(self.base)[0]) == str(graph):
                self._variants[key] = self.variant
            else:
                self._variants[key] = self._make_variant(graph, origins)
        return self._variants[key]

    def _make_variant(self, graph: Graph, origins: dict[str, str]) -> Variant:
        found = {v: self.run.statistics[o] for v, o in origins.items() if o in self.run.statistics}
        if "low" not in self.config.precisions or not self.config.sort_channels:
            return Variant(graph, origins, found, {}, {}, set(), None)
        plan = layout_plan(graph, found, self.settings)
        laid_out, report = apply_layout(graph, plan)
        orders, axes, irregular = {}, {}, set()
        for value, moved in plan.orders.items():
            order = plan.permutation(value)
            if order is None:
                irregular.add(value)
            else:
                orders[value], axes[value] = order, moved.axis
                if value in found and found[value].channel_max is not None:
                    found[value] = found[value].permuted(order)
        for node in laid_out.nodes:  # reorders of what a reader needs in its first order
            if node.name not in origins and node.op == "gather" and node.inputs[0] in origins:
                source = node.inputs[0]
                if origins[source] in self.run.statistics:
                    found[node.name] = self.run.statistics[origins[source]]
        return Variant(laid_out, origins, found, orders, axes, irregular, report)

    def _patches(self, variant: Variant, node: Node) -> npt.NDArray[np.float32]:
        """The samples of a layer's inputs in the variant's order of channels."""
        order = variant.orders.get(node.inputs[0])
        patches = self.run.patches[node.name]
        return patches if order is None else patches[:, order]

    def _make_template(self) -> Program:
        """Every layer at the lowest of the precisions at ratio 1, at 8 bits at ratio 0."""
        return self.program(dict.fromkeys(self.layers, "low" if "low" in self.config.precisions else "int8"), self.variant)

    def program(self, precisions: Mapping[str, str], variant: Variant | None = None, isolate: bool = False) -> Program:
        """The program of a plan, with ratio 0 (low layers at 8 bits) beside ratio 1, the plan, if any layer is low.

        precisions: per planned layer; layers left out are "int8", and so are those that may not be low. No run of the network
        but for bias = "runs".
        """
        variant = variant or self.variant
        floats = {name: p for name, p in precisions.items() if p in FLOATS}
        graph = store_bfloat16(with_precisions(variant.graph, floats))
        low = {n for n, p in precisions.items() if p == "low" and not self.reasons[n]}
        settings = self.settings.updated(ratios=(0.0, 1.0) if low else (0.0,))
        program = build_program(graph, variant.statistics, settings, group_bounds, isolate=isolate)
        # `updated` keeps 0 among the ratios
        self._low_tables(variant, program, low)
        for name, layer in program.layers.items():
            if name in low:
                layer.low[-1] = True
            elif layer.eligible:
                layer.eligible, layer.reason = False, PLANNED
        self._restore_means(variant, program, graph, settings)
        return program

    def _low_tables(self, variant: Variant, program: Program, low: set[str]) -> None:
        """Shifts and rounded weights of the low layers; kept for the next program of the variant."""
        encodings = {n: program.qparams[program.instruction(n).inputs[0]] for n in low}
        missing = [n for n in program.layers if n in low and not _same(variant.low.get(n), encodings[n])]
        samples = {}
        for name in missing:
            layer, q = program.layers[name], encodings[name]
            patches = quantized(self._patches(variant, variant.graph.node(name)), q).astype(np.int16)
            samples[name] = LayerSamples(layer, patches, q.signed, self.config.bias != "none")
        choose_shifts(program, samples, self.settings)
        for name in missing:
            layer = program.layers[name]
            assert layer.weight is not None
            variant.low[name] = LowLayer(
                encodings[name], layer.low_weight, layer.activation_shift, layer.weight_shift, layer.accumulator_bound
            )
        for name in low:
            layer, known = program.layers[name], variant.low[name]
            layer.low_weight, layer.accumulator_bound = known.low_weight, known.accumulator_bound
            layer.activation_shift, layer.weight_shift = known.activation_shift, known.weight_shift

    def _restore_means(self, variant: Variant, program: Program, graph: Graph, settings: QuantizeConfig) -> None:
        if self.config.bias == "none":
            return
        for name, layer in program.layers.items():
            if layer.weight is not None:
                patches = self._patches(variant, variant.graph.node(name))
                restore_mean(variant.graph, variant.graph.node(name), layer, patches, program)
        if self.config.bias == "runs":
            prepared = Prepared(graph, variant.statistics, self.inputs, variant.layout, self.samples)
            restore_means(prepared, program, settings, range(len(program.ratios)))
            self.inferences["finishing"] += 1 + len(program.ratios)


def _same(known: LowLayer | None, encoding: QParams) -> bool:
    return known is not None and known.input == encoding


def quantized(x: npt.NDArray[np.float32], q: QParams) -> npt.NDArray[np.float32]:
    """Integers of an encoding, as float32."""
    result: npt.NDArray[np.float32] = np.clip(np.rint(x * np.float32(1.0 / q.scale)), q.qmin, q.qmax)
    return result


def _low_input(layer: QuantizedLayer, integers: npt.NDArray[np.float32], q: QParams) -> npt.NDArray[np.float32]:
    """Inputs [rows, C, taps] read back from low precision."""
    shift = layer.activation_shift[layer.channel_groups()].astype(np.int32)[None, :, None]
    return read_back(integers.astype(np.int32), shift, layer.amax, q.signed).astype(np.float32)


def _variance(samples: Sequence[npt.NDArray[np.float32]]) -> float:
    """Mean over channels of the variance of a value's samples [places, channels]; above 0."""
    return max(float(np.concatenate(samples).var(axis=0, dtype=np.float64).mean()), 1e-30)


def _relative(exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    signal = float(np.square(exact, dtype=np.float64).sum())
    noise = float(np.square(exact - other, dtype=np.float64).sum())
    return noise / signal if signal > 0.0 else 0.0


def restore_mean(
    graph: Graph, node: Node, layer: QuantizedLayer, patches: npt.NDArray[np.float32], program: Program
) -> None:
    """Bias rows that give a layer the mean output of its float counterpart, on samples of the float network's inputs.

    What quantization does to the mean is taken from the layer's own operands; that the layers before it have their means
    restored too is relied on. (The bias table of `bitdial quantize` runs the network layer by layer instead.)
    """
    assert node.weight is not None and layer.weight is not None
    q = program.qparams[program.instruction(node.name).inputs[0]]
    unit = layer.weight_scale.astype(np.float64) * q.scale
    bias = graph.constants[node.bias].astype(np.float64) if node.bias is not None else np.zeros(len(unit))
    target = (bias + _mean_output(graph.constants[node.weight], patches, layer.conv_groups)) / unit
    integers = quantized(patches, q)
    room = INT32_LIMIT - layer.accumulator_bound
    for index in range(len(program.ratios)):
        weight, inputs = layer.weight, integers
        if layer.n_groups and bool(layer.low[index].all()):
            weight, inputs = read_back_weights(layer), _low_input(layer, integers, q)
        row = np.rint(target - _mean_output(weight, inputs, layer.conv_groups))
        layer.bias[index] = np.clip(row, -room, room).astype(np.int32)


def _mean_output(
    weight: npt.NDArray[Any], patches: npt.NDArray[np.float32], conv_groups: int
) -> npt.NDArray[np.float64]:
    """float64 [O]: mean over samples of the products of weights and inputs."""
    mean = patches.mean(axis=0, dtype=np.float64).reshape(conv_groups, 1, -1)
    w = weight.reshape(conv_groups, len(weight) // conv_groups, -1)
    result: npt.NDArray[np.float64] = (w * mean).sum(axis=2).reshape(-1)
    return result


def store_bfloat16(graph: Graph) -> Graph:
    """The graph with the weights of its bfloat16 layers as bit patterns (in place; nodes and constants are its own)."""
    for node in graph.nodes:
        if node.attrs.get("precision") == "bfloat16":
            assert node.weight is not None
            node.weight = fresh_constant(graph, f"{node.weight}_bf16", to_bits(graph.constants[node.weight]))
    drop_unused(graph)
    return graph


def analyse(
    model: nn.Module | Graph,
    inputs: Sequence[Tensor],
    config: LayerwiseConfig,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Capture, fold, and make the two runs.

    inputs: calibration samples, one tensor per model input, batch first. names: keyword names of the inputs (dicts). Raises
    CaptureError, CalibrationError, ConfigError.
    """
    inputs = calibration_inputs(inputs)
    started = time.perf_counter()
    progress("capture", 0.0)
    base = fold(captured(model, inputs, names))
    seconds = time.perf_counter() - started
    with torch.no_grad():
        result = Analysis(base, inputs, config, progress)
    result.seconds = {"capture": seconds, **result.seconds}
    return result


__all__ = ["Analysis", "Variant", "analyse", "quantize_config"]
