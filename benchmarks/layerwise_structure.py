"""Layer-wise plans of ImageNet networks with random weights: conversions, time to rank, latency, by fusion and by ranking.

Weights do not influence how many conversions a plan has or how fast it runs; there is no accuracy to measure. How far the
outputs of a plan are from those of the float network is told all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.benchmarking.timing import Case, Plan, measure_interleaved, timed
from bitdial.engines.base import available_engines, create_engine
from bitdial.graph.capture import capture
from bitdial.pipeline.layerwise import Compilation, layer_costs
from bitdial.pipeline.layerwise_analysis import analyse
from bitdial.quantization.program import Program
from bitdial.selection.layerwise import METRICS, LayerwiseConfig, layer_losses
from bitdial.zoo.registry import build_model, torchvision_compat
from layerwise_rankings import n_runs, rules, search_kinds
from measure import make_engine

STRUCTURES = ("resnet18", "resnet50", "squeezenet1_1", "vgg16", "mobilenet_v2")
FUSIONS = ("best", "default", "none", "isolated")
RANKING_BUDGETS: dict[str, dict[str, Any]] = {
    "low+int8, 88 % of the time": {"budget_latency": "88%", "precisions": ("low", "int8")},
    "int8+float32, 150 % of the bytes": {"budget_size": "150%", "precisions": ("int8", "float32")},
}
SCORING = ("quantized run", "score")  # the rest of an analysis is needed by every ranking with runs: the quantized network
SAMPLING = {"batch_size": 2, "patches": 128, "metric_values": 16384}


def build(name: str, size: int, images: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and random pictures."""
    torchvision_compat()
    torch.manual_seed(0)
    model = build_model(f"torchvision:{name}").eval()
    return model, torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def interleaved_seconds(programs: Mapping[str, Program], rounds: int = 31) -> dict[str, float]:
    """Median seconds of a run of one sample, one thread, all programs in turns; nothing without the CPU engine."""
    if available_engines()["cpu"]:
        return {}
    rng = np.random.default_rng(0)
    cases = []
    for name, program in programs.items():
        engine = create_engine(program, "cpu", batch_hint=1)
        (x,) = (rng.standard_normal(engine.shape(v, 1), dtype=np.float32) for v in program.inputs)
        cases.append(Case(name, timed(lambda engine=engine, x=x, ratio=program.ratios[-1]: engine.run(x, ratio))))
    return {name: found.median for name, found in measure_interleaved(cases, Plan(repeats=rounds)).items()}


def measure_structure(name: str, size: int) -> dict[str, Any]:
    """Time to score and plan, pairs of the plan under every fusion, and its latency."""
    model, x = build(name, size, 4)
    config = LayerwiseConfig(budget_latency="88%", calibration_images=4, **SAMPLING)
    analysis = analyse(model, [x], config.updated(fusion="none"))  # which keeps the ranges of unfused values too
    costs = layer_costs(analysis, config)
    compilation = Compilation(analysis, config, costs=costs)
    compiled = compilation.run()
    mixed = {e.name: "float32" if i % 4 == 3 else "int8" for i, e in enumerate(analysis.evidence)}
    programs = {
        fusion: Compilation(analysis, config.updated(fusion=fusion), costs=costs).build(compiled.plan.precisions)
        for fusion in FUSIONS
    }
    programs["all int8, best"] = compilation.build({e.name: "int8" for e in analysis.evidence})
    return {
        "parameters": sum(e.parameters for e in analysis.evidence),
        "layers": len(analysis.evidence),
        "size": size,
        "seconds": dict(analysis.seconds),
        "scoring_seconds": sum(v for k, v in analysis.seconds.items() if k != "capture"),
        "predicted_share_of_int8": compiled.reached["latency_share_of_int8"],
        "borders": compilation.borders(compiled.plan.precisions),
        "borders_every_fourth_layer_float32": compilation.borders(mixed),
        "latency": interleaved_seconds(programs),
    }


def relative_noise(program: Program, x: Tensor, exact: Tensor) -> float:
    """Energy of the difference to the float network's outputs, over theirs."""
    engine = make_engine(program)
    outputs = torch.cat([engine.run(part, program.ratios[-1]) for part in x.split(4)])
    return float((outputs - exact).square().sum() / exact.square().sum())


def measure_rankings(
    name: str, size: int, images: int, budget: Mapping[str, Any], progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Plans by the scores of two runs, by the n-run search and by the rules at one budget, on the same images. `rank_seconds`,
    on the processor, go beyond what the quantized network took."""
    model, x = build(name, size, images)
    config = LayerwiseConfig(**budget, calibration_images=images, **SAMPLING)
    with torch.no_grad():
        exact = torch.cat([model(part) for part in x.split(4)])
    graph = capture(model, (x[:2],))
    started, on_processor = time.perf_counter(), time.process_time()  # what else runs on the machine does not count
    analysis = analyse(graph, [x], config, progress=progress)
    load = (time.process_time() - on_processor) / (time.perf_counter() - started)
    seconds_of = {step: load * seconds for step, seconds in analysis.seconds.items()}
    scoring = sum(seconds_of[step] for step in SCORING)
    losses = {
        "propagated": layer_losses(analysis.evidence, ["propagated"]),
        "combined": layer_losses(analysis.evidence, METRICS),
    }
    seconds = dict.fromkeys(losses, scoring)
    for kind, other in search_kinds(analysis).items():
        losses[kind], seconds[kind] = n_runs(
            analysis, other, lambda p: relative_noise(p, x, exact), lambda share, kind=kind: progress(kind, share)
        )
    losses.update(rules(analysis))
    costs = layer_costs(analysis, config)
    macs = {e.name: e.macs for e in analysis.evidence}
    lowest, sought = config.precisions[0], None
    rows, programs = {}, {}
    for method, values in losses.items():
        compilation = Compilation(analysis, config, values, costs)
        compiled = compilation.run()
        chosen = compiled.plan.precisions
        if method == "n runs":
            sought = chosen
        programs[method] = compiled.program
        rows[method] = {
            "rank_seconds": seconds.get(method, 0.0),
            "layers": {p: list(chosen.values()).count(p) for p in config.precisions},
            "lowest_share_of_macs": sum(macs[n] for n, p in chosen.items() if p == lowest) / sum(macs.values()),
            "pairs": {k: compilation.borders(chosen)[k]["pairs"] for k in ("isolated", "unfused", "best")},
            "size": compiled.reached["size"],
            "predicted_share_of_int8": compiled.reached["latency_share_of_int8"],
            "noise": relative_noise(compiled.program, x, exact),
            "precisions": chosen,
        }
    assert sought is not None
    for row in rows.values():
        row["same_as_n_runs"] = sum(p == sought[n] for n, p in row["precisions"].items()) / len(sought)
    progress("latency", 0.0)
    milliseconds = interleaved_seconds(programs, rounds=15)
    for method, row in rows.items():
        row["latency"] = milliseconds.get(method)
    return {
        "images": images, "size": size, "layers": len(analysis.layers), "rows": rows, "seconds": seconds_of,
        "preparation_seconds": sum(v for step, v in seconds_of.items() if step not in SCORING),
    }  # fmt: skip


__all__ = ["RANKING_BUDGETS", "STRUCTURES", "interleaved_seconds", "measure_rankings", "measure_structure"]
