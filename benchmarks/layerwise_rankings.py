"""Rankings of layers that the layer-wise scores are compared with, for any network: the n-run search and the rules."""

from __future__ import annotations

import time
from collections.abc import Callable

from bitdial.graph.passes import fused
from bitdial.pipeline.layerwise_analysis import Analysis
from bitdial.quantization.domains import ends
from bitdial.quantization.program import Program
from bitdial.selection.layerwise import Losses, first_last, one_by_one, random_losses

RANDOM_SEEDS = (0, 1, 2)


def rules(analysis: Analysis) -> dict[str, Losses]:
    """What needs no run of the network: random rankings, first and last layers before all others."""
    first, last = ends(fused(analysis.base)[0], set(analysis.layers))
    found = {f"random {seed}": random_losses(analysis.evidence, seed) for seed in RANDOM_SEEDS}
    return {**found, "first/last": first_last(analysis.evidence, first | last)}


def search_kinds(analysis: Analysis) -> dict[str, str]:
    """Name of an n-run search -> precision of the layers that are not its turn. The second is quicker: all of it runs in the CPU
    engine. Only where layers may be low is it another search than the first."""
    kinds = {"n runs": "float32"}
    if "low" in analysis.config.precisions:
        kinds["n runs among int8"] = "int8"
    return kinds


def n_runs(
    analysis: Analysis, other: str, noise: Callable[[Program], float], progress: Callable[[float], None]
) -> tuple[Losses, float]:
    """The older search: `noise` of the network with one layer at its lowest precision and the rest at `other`, layer by layer;
    and its seconds on the processor, so that what else runs on the machine does not count."""

    def lowered(changed: dict[str, str]) -> float:
        return noise(analysis.program({**dict.fromkeys(analysis.layers, other), **changed}))

    started = time.process_time()
    before = lowered({}) if other == "int8" else 0.0  # among float layers there is no noise without the layer
    losses = one_by_one(analysis.evidence, lambda name, precision: lowered({name: precision}) - before, progress)
    return losses, time.process_time() - started


__all__ = ["RANDOM_SEEDS", "n_runs", "rules", "search_kinds"]
