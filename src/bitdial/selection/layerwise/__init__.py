"""Layer-wise plans (QuantuneV2): one precision per layer from local metrics, under budgets. NumPy only."""

from __future__ import annotations

from bitdial.selection.layerwise.baselines import first_last, one_by_one, random_losses
from bitdial.selection.layerwise.config import ALL_METRICS, METRICS, PRECISIONS, LayerwiseConfig, is_share, parse_budget
from bitdial.selection.layerwise.costs import estimated_seconds, table_seconds, weight_bytes
from bitdial.selection.layerwise.plan import FloorResult, LayerOptions, Option, Plan, Step, make_plan, meet_floor
from bitdial.selection.layerwise.scores import LayerEvidence, Losses, layer_losses, metric_values

__all__ = [
    "ALL_METRICS",
    "METRICS",
    "PRECISIONS",
    "FloorResult",
    "LayerEvidence",
    "LayerOptions",
    "LayerwiseConfig",
    "Losses",
    "Option",
    "Plan",
    "Step",
    "estimated_seconds",
    "first_last",
    "is_share",
    "layer_losses",
    "make_plan",
    "meet_floor",
    "metric_values",
    "one_by_one",
    "parse_budget",
    "random_losses",
    "table_seconds",
    "weight_bytes",
]
