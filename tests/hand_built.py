"""Programs written as version 1 of the file wrote them: a graph of nodes, and tables by the name of a node beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitdial.artifact.version1 import Tables, lower
from bitdial.graph.ir import Graph
from bitdial.quantization.program import Program, QParams, QuantizedLayer


def program_of(
    graph: Graph,
    ratios: list[float],
    qparams: Mapping[str, QParams] | None = None,
    layers: Mapping[str, QuantizedLayer] | None = None,
    tables: Mapping[str, Any] | None = None,
    factors: Mapping[str, Any] | None = None,
    float_reasons: Mapping[str, str] | None = None,
    **rest: Any,
) -> Program:
    """rest: fields of `Program`."""
    qparams = dict(qparams or {})
    beside = Tables(graph.types, qparams, layers or {}, tables or {}, factors or {}, float_reasons or {})
    steps = lower(graph.nodes, beside)
    return Program(
        graph.inputs, graph.outputs, steps, graph.types, graph.constants, qparams, list(ratios), graph.structure, **rest
    )
