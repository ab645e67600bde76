"""Layer-wise compilation: from the two runs to a plan under budgets, and its program (design notes, section 5).

The plan's program is an ordinary one: it is saved, loaded, inspected and run like any other. Ratio 1 is the plan; ratio 0,
with the dial kept, the same with its low layers at 8 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.artifact import restrict_to_band, to_bytes
from bitdial.errors import BudgetError, ConfigError
from bitdial.graph.ir import Graph
from bitdial.pipeline.layerwise_analysis import FLOATS, Analysis, analyse
from bitdial.pipeline.preparing import Progress, silent
from bitdial.pipeline.quantizing import layout_summary
from bitdial.quantization.borders import count_borders, with_precisions
from bitdial.quantization.calibration import summarize
from bitdial.quantization.latency_table import LatencyTable, layer_shape
from bitdial.quantization.predicted_latency import latency_curves
from bitdial.quantization.program import Program
from bitdial.selection.layerwise import (
    LayerOptions,
    LayerwiseConfig,
    Losses,
    Option,
    Plan,
    estimated_seconds,
    is_share,
    layer_losses,
    make_plan,
    meet_floor,
    metric_values,
    parse_budget,
    table_seconds,
    weight_bytes,
)

ROUNDS = 12  # corrections of a plan whose file or measured time turned out larger than predicted
TIMING_RUNS = 15
Accuracy = Callable[[Program], float]


@dataclass
class Costs:
    """Seconds of every planned layer by precision, in the unit of `latency`, and the table behind them."""

    seconds: dict[str, dict[str, float]]
    table: LatencyTable | None = None


@dataclass
class Compiled:
    """A plan's program and how it came about."""

    program: Program
    plan: Plan
    losses: Losses
    analysis: Analysis
    reached: dict[str, Any] = field(default_factory=dict)


def layer_costs(analysis: Analysis, config: LayerwiseConfig) -> Costs:
    """Times of the layers: estimated by multiply-accumulates, from a table, or from one measured here. Raises EngineError
    where the CPU engine is missing for latency = "measured"."""
    layers = {e.name: e for e in analysis.evidence}
    times = config.relative_time
    named = {str(p): t for p, t in times.items()}
    if config.latency == "macs":
        seconds = {
            n: {p: estimated_seconds(p, e.macs, named) for p in (*e.precisions, "int8")} for n, e in layers.items()
        }
        return Costs(seconds)
    table = config.latency_table if config.latency == "table" else measured_table(analysis.template)
    assert table is not None
    curves = latency_curves(analysis.template, table)
    seconds = {}
    for name, evidence in layers.items():
        eight, low = float(curves[name].at(0.0)), float(curves[name].at(1.0))
        seconds[name] = {p: table_seconds(p, eight, low, named) for p in (*evidence.precisions, "int8")}
    return Costs(seconds, table)


def measured_table(program: Program) -> LatencyTable:
    """Times of a program's layers on this machine, one thread, single samples. Raises EngineError without the CPU engine."""
    from bitdial.engines.cpu.layer_timing import measure_table

    shapes = []
    for name, layer in program.layers.items():
        if layer.weight is not None and layer.weight.ndim in (2, 4) and layer.conv_groups == 1:
            shapes.append(layer_shape(program.instruction(name).as_node(), program.types, layer.weight.shape))
    return measure_table(shapes, batch=1, repeats=5)


def measured_seconds(program: Program, ratio: float = 1.0, batch: int = 1) -> float:
    """Median seconds per sample of whole runs in the CPU engine, one thread; layers in float run in torch there."""
    from bitdial.engines.base import create_engine

    engine = create_engine(program, "cpu", batch_hint=batch)
    rng = np.random.default_rng(0)
    inputs: list[Any] = [rng.standard_normal(engine.shape(v, batch), dtype=np.float32) for v in program.inputs]  # type: ignore[attr-defined]
    x = inputs[0] if len(inputs) == 1 else inputs
    times = []
    for turn in range(TIMING_RUNS + 2):
        started = time.perf_counter()
        engine.run(x, ratio)
        if turn >= 2:
            times.append(time.perf_counter() - started)
    return float(np.median(times)) / batch


def options_of(analysis: Analysis, losses: Losses, costs: Costs) -> list[LayerOptions]:
    """What the planner chooses among."""
    result = []
    layers, dial = analysis.template.layers, analysis.config.dial
    stored = any(layer.low_weight is not None for layer in layers.values())
    for evidence in analysis.evidence:
        layer = layers[evidence.name]
        assert layer.weight is not None
        size, outputs = layer.weight.size, len(layer.weight)
        result.append(
            LayerOptions(
                evidence.name,
                tuple(
                    Option(
                        p, losses[evidence.name][p],
                        float(weight_bytes(p, size, outputs, layer.wmax, dial, stored)),
                        costs.seconds[evidence.name][p],
                    )
                    for p in evidence.precisions
                ),
            )  # fmt: skip
        )
    return result


class Compilation:
    """Plans and programs of one analysis under one config. losses: None takes those of the config's metric; other rankings
    (an n-run search, random, first/last) are compared by passing theirs."""

    def __init__(
        self, analysis: Analysis, config: LayerwiseConfig, losses: Losses | None = None, costs: Costs | None = None
    ) -> None:
        self.analysis, self.config = analysis, config
        given = losses is not None
        self.metric = "given" if given else "+".join(config.metric)
        self.losses = losses or layer_losses(analysis.evidence, config.metric, config.sqnr_change)
        self.costs = costs or layer_costs(analysis, config)
        self.options = options_of(analysis, self.losses, self.costs)
        self.extra: dict[str, Any] = {}  # more provenance of the caller's
        eight = {e.name: "int8" for e in analysis.evidence}
        self.eight_seconds = sum(self.costs.seconds[name]["int8"] for name in eight)
        self.size_limit: float | None = None
        self.time_limit: float | None = None
        self.size_limit, self.time_limit = self._size_limit(eight), self._time_limit(eight)

    # -- budgets -------------------------------------------------------------------------------------------------------

    def _size_limit(self, eight: Mapping[str, str]) -> float | None:
        value = parse_budget(self.config.budget_size, "budget_size")
        if value is None or self.config.budget_size is None or not is_share(self.config.budget_size):
            return value
        plan = Plan({name: Option("int8", 0.0, 0.0, self.costs.seconds[name]["int8"]) for name in eight})
        return value * len(to_bytes(self._sized(plan, {})))

    def _time_limit(self, eight: Mapping[str, str]) -> float | None:
        value = parse_budget(self.config.budget_latency, "budget_latency")
        if value is None or self.config.budget_latency is None or not is_share(self.config.budget_latency):
            return value
        if self.config.latency == "measured":
            return value * measured_seconds(self.build(eight))
        return value * self.eight_seconds

    def plan(self, size: float | None, seconds: float | None) -> Plan:
        """The plan for limits on the layers' own bytes and seconds. Raises BudgetError."""
        cost = "seconds" if self.config.latency != "macs" else "size"
        return make_plan(self.options, size=size, seconds=seconds, order=self.config.order, cost=cost)

    # -- programs ------------------------------------------------------------------------------------------------------

    def build(self, precisions: Mapping[str, str]) -> Program:
        """The program of a plan under the config's fusion and dial, without provenance."""
        analysis, fusion = self.analysis, self.config.fusion
        isolate = fusion == "isolated"
        if fusion == "default":
            program = analysis.program(precisions)
        elif fusion == "best":
            program = analysis.program(precisions, analysis.make_variant(analysis.best_fusion(precisions).choice))
        else:
            program = analysis.program(precisions, analysis.make_variant(None), isolate)
        if not self.config.dial and len(program.ratios) > 1:
            program = restrict_to_band(program, (1.0, 1.0))
        return program

    def borders(self, precisions: Mapping[str, str]) -> dict[str, Any]:
        """Conversions of a plan: every layer alone and unfused, unfused, fused by default, and by the best fusion."""
        floats = {n: p for n, p in precisions.items() if p in FLOATS}
        marked = with_precisions(self.analysis.base, floats)
        ignored = self.config.ignored
        best = self.analysis.best_fusion(precisions)
        return {
            "isolated": count_borders(marked, ignored, isolate=True).summary(),
            "unfused": count_borders(marked, ignored).summary(),
            "default": best.default.summary(),
            "best": best.borders.summary(),
            "choice": best.choice,
            "compared": best.compared,
        }

    def finish(self, program: Program, plan: Plan, reached: Mapping[str, Any]) -> Program:
        """The program with its provenance."""
        from bitdial._version import __version__

        analysis, config = self.analysis, self.config
        evidence = {e.name: e for e in analysis.evidence}
        program.provenance = {
            **program.provenance,
            "bitdial": __version__,
            "torch": torch.__version__,
            "config": {**config.model_dump(mode="json"), "selector": "layer-wise"},
            "seed": config.seed,
            "calibration": {"samples": analysis.samples, "ranges": summarize(analysis.variant.statistics)},
            "layout": layout_summary(analysis.variant.layout),
            "seconds": dict(analysis.seconds),
            "threads": torch.get_num_threads(),
            **({"warnings": list(analysis.warnings)} if analysis.warnings else {}),
            "layerwise": {
                "metric": self.metric,
                "order": config.order,
                "inferences": dict(analysis.inferences),
                "budgets": {
                    "size": self.size_limit, "latency": self.time_limit, "latency_source": config.latency,
                    "accuracy_floor": config.accuracy_floor,
                },
                "reached": dict(reached),
                "fusion": config.fusion,
                "borders": self.borders(plan.precisions) if plan.chosen else {},
                "layers": [
                    {
                        "name": name,
                        "source": evidence[name].source,
                        "precision": option.precision,
                        "bytes": int(option.size),
                        "score": _significant(max(self.losses[name].values())),
                        "metrics": {
                            m: _significant(metric_values(evidence[name], m, config.sqnr_change)[evidence[name].precisions[0]])
                            for m in config.metric
                        },
                    }
                    for name, option in plan.chosen.items()
                ],
                **self.extra,
            },
        }  # fmt: skip
        return program

    # -- the plan ------------------------------------------------------------------------------------------------------

    def run(self, accuracy: Accuracy | None = None, progress: Progress = silent) -> Compiled:
        """The plan that meets every budget. Raises BudgetError with the reason and the nearest reachable value, ConfigError for
        an accuracy floor without something to measure it on."""
        floor = self.config.accuracy_floor
        if floor is not None and accuracy is None:
            raise ConfigError("accuracy_floor needs labelled validation data to measure accuracy on: pass validation")
        if floor is not None and accuracy is not None and self.size_limit is None and self.time_limit is None:
            return self._for_floor(floor, accuracy, progress)
        compiled = self._within_limits(progress)
        if floor is not None and accuracy is not None:
            progress("accuracy", 0.0)
            found = accuracy(compiled.program)
            if found < floor:
                raise BudgetError(
                    f"accuracy floor {100 * floor:.2f} %: the plan within the other budgets reaches {100 * found:.2f} %; widen "
                    "them, allow higher precisions, or lower the floor",
                    found,
                )
            compiled.reached["accuracy"] = found
            self.finish(compiled.program, compiled.plan, compiled.reached)
        progress("done", 1.0)
        return compiled

    def _for_floor(self, floor: float, accuracy: Accuracy, progress: Progress) -> Compiled:
        whole = self.plan(None, None)
        tries = max(1, len(whole.steps).bit_length() + 1)
        done = 0

        def measure(plan: Plan) -> float:
            nonlocal done
            progress("accuracy", min(1.0, done / tries))
            done += 1
            return accuracy(self.build(plan.precisions))

        try:
            found = meet_floor(whole, floor, measure)
        except BudgetError as error:
            raise BudgetError(f"accuracy floor: {error}; allow higher precisions, or lower the floor", error.nearest) from None
        reached = {"accuracy": found.accuracy, "validation_runs": len(found.measured)}
        program = self._sized(found.plan, reached)
        progress("done", 1.0)
        return Compiled(program, found.plan, self.losses, self.analysis, reached)

    def _sized(self, plan: Plan, reached: dict[str, Any]) -> Program:
        """The finished program; its size and predicted time go into `reached`."""
        program = self.finish(self.build(plan.precisions), plan, reached)
        reached["size"] = len(to_bytes(program))
        reached["predicted_latency"] = plan.seconds
        reached["latency_share_of_int8"] = plan.seconds / self.eight_seconds if self.eight_seconds else None
        return self.finish(program, plan, reached)

    def _within_limits(self, progress: Progress) -> Compiled:
        """Plan, build, measure; where file or time are over a budget, take the excess off and plan again."""
        cheapest = self._cheapest()
        overhead = 0.0 if self.size_limit is None else len(to_bytes(self._sized(cheapest, {}))) - cheapest.size
        lag = 0.0
        timed = self.config.latency == "measured" and self.time_limit is not None
        if timed:
            lag = measured_seconds(self.build(cheapest.precisions)) - cheapest.seconds
        for turn in range(ROUNDS):
            progress("plan", turn / ROUNDS)
            size = None if self.size_limit is None else self.size_limit - overhead
            seconds = None if self.time_limit is None else self.time_limit - lag
            for left, limit, fixed, unit in (
                (size, self.size_limit, overhead, "bytes"), (seconds, self.time_limit, lag, "seconds"),
            ):  # fmt: skip
                if left is not None and left <= 0.0:
                    return self._last_resort(
                        cheapest, timed, f"{fixed:.6g} {unit} of {limit:.6g} are needed beside the layers"
                    )
            try:
                plan = self.plan(size, seconds)
            except BudgetError as error:
                return self._last_resort(cheapest, timed, str(error))
            found, over_size, over_time = self._weighed(plan, timed)
            if over_size <= 0.0 and over_time <= 0.0:
                return found
            # What stands beside the layers depends on the plan, so the excess alone may not be enough: ask for a little more
            # each time.
            overhead += max(over_size, 0.0) * 1.5 + 0.001 * turn * (self.size_limit or 0.0) * (over_size > 0.0)
            lag += max(over_time, 0.0) + 0.01 * turn * (self.time_limit or 0.0) * (over_time > 0.0)
        return self._last_resort(cheapest, timed, f"no plan was within them after {ROUNDS} corrections")

    def _weighed(self, plan: Plan, timed: bool) -> tuple[Compiled, float, float]:
        """(the finished plan, bytes over the budget, seconds over it); negative or 0 where it is met."""
        reached: dict[str, Any] = {}
        program = self._sized(plan, reached)
        if timed:
            reached["measured_latency"] = measured_seconds(program)
            self.finish(program, plan, reached)
        over_size = 0.0 if self.size_limit is None else len(to_bytes(program)) - self.size_limit
        seconds = reached["measured_latency"] if timed else plan.seconds
        over_time = 0.0 if self.time_limit is None else seconds - self.time_limit
        return Compiled(program, plan, self.losses, self.analysis, reached), over_size, over_time

    def _last_resort(self, cheapest: Plan, timed: bool, why: str) -> Compiled:
        """The cheapest plan, if it is within the budgets after all (corrections can overshoot); else raises BudgetError."""
        found, over_size, over_time = self._weighed(cheapest, timed)
        if over_size <= 0.0 and over_time <= 0.0:
            return found
        raise self._refused(cheapest, why)

    def _cheapest(self) -> Plan:
        """The plan with every layer at its smallest, or where only time is limited its fastest, option."""
        by_time = self.size_limit is None
        return Plan(
            {o.name: min(o.options, key=lambda c: (c.seconds, c.size) if by_time else (c.size, c.seconds)) for o in self.options}
        )

    def _refused(self, cheapest: Plan, why: str) -> BudgetError:
        """The error for budgets out of reach, with what the cheapest plan really needs."""
        size = len(to_bytes(self._sized(cheapest, {})))
        seconds = cheapest.seconds
        if self.config.latency == "measured" and self.time_limit is not None:
            seconds = measured_seconds(self.build(cheapest.precisions))
        if self.size_limit is not None and size > self.size_limit:
            return BudgetError(
                f"size budget of {self.size_limit:.0f} bytes cannot be met: the smallest file with these precisions has {size} "
                f"bytes ({why}); allow lower precisions, or raise the budget to that",
                float(size),
            )
        if self.time_limit is not None and seconds > self.time_limit:
            share = f", {100 * seconds / self.eight_seconds:.1f} % of the all-int8 plan's" if self.eight_seconds else ""
            return BudgetError(
                f"latency budget of {self.time_limit:.6g} cannot be met: the fastest plan with these precisions needs "
                f"{seconds:.6g}{share} ({why}); allow lower precisions, or raise the budget to that",
                seconds,
            )
        return BudgetError(f"the budgets cannot be met together ({why}); raise one of them", seconds)


def _significant(value: float) -> float:
    """Four digits: provenance is part of the file."""
    return float(f"{value:.4g}")


def compile_layerwise(
    model: nn.Module | Graph,
    inputs: Sequence[Tensor],
    config: LayerwiseConfig,
    *,
    names: Sequence[str] | None = None,
    accuracy: Accuracy | None = None,
    progress: Progress = silent,
) -> Compiled:
    """Analyse a network in two runs over its calibration data, plan, and build the plan's program.

    accuracy: program -> accuracy on validation data at its highest ratio, for accuracy_floor. Raises CaptureError,
    CalibrationError, ConfigError, BudgetError.
    """
    analysis = analyse(model, inputs, config, names=names, progress=progress)
    progress("plan", 0.0)
    return Compilation(analysis, config).run(accuracy, progress)
