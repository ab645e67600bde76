"""Which groups of feature channels run low at each ratio: scores, random, greedy and evolutionary selection.

NumPy only, and it knows no engine: candidates are scored by a callable that the caller passes in (`Evaluate`).
Source: design notes, section 2.
"""

from __future__ import annotations

from bitdial.selection.baselines import GreedySelector, RandomSelector
from bitdial.selection.evolutionary import EvolutionarySelector, EvolutionarySettings
from bitdial.selection.latency import LatencyModel, latency_completion
from bitdial.selection.problem import (
    Costs,
    Evaluate,
    LatencyGoal,
    SearchProgress,
    SelectionProblem,
    SelectionResult,
    Selector,
)
from bitdial.selection.registry import DEFAULT_SELECTOR, get_selector, select_groups, selector_names
from bitdial.selection.sensitivity import layer_sensitivity, rescale_scores
from bitdial.selection.targets import density_ranks, greedy_completion, meet_target

__all__ = [
    "DEFAULT_SELECTOR",
    "Costs",
    "Evaluate",
    "EvolutionarySelector",
    "EvolutionarySettings",
    "GreedySelector",
    "LatencyGoal",
    "LatencyModel",
    "RandomSelector",
    "SearchProgress",
    "SelectionProblem",
    "SelectionResult",
    "Selector",
    "density_ranks",
    "get_selector",
    "greedy_completion",
    "latency_completion",
    "layer_sensitivity",
    "meet_target",
    "rescale_scores",
    "select_groups",
    "selector_names",
]
