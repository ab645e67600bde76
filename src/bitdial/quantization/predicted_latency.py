"""Predicted seconds of a program's layers by what they run low, from a latency table. NumPy only.

A prediction adds up the conv and linear layers, each alone; other operators and what layers do to each other's caches are
not in it. Gains between ratios are what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.quantization.exactness import layer_mechanisms
from bitdial.quantization.latency_table import LatencyTable, layer_shape
from bitdial.quantization.program import Program

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LatencyCurve:
    """Seconds per sample of a layer, piecewise linear in its low share (0..1).

    shares, seconds: float64 [n], shares rising from 0 to 1. estimated_from: see `LayerTimes`.
    """

    shares: FloatArray
    seconds: FloatArray
    mechanism: str
    estimated_from: str | None

    def at(self, share: npt.ArrayLike) -> FloatArray:
        """float64, shape of `share`."""
        result: FloatArray = np.interp(np.asarray(share, dtype=np.float64), self.shares, self.seconds)
        return result


def latency_curves(program: Program, table: LatencyTable) -> dict[str, LatencyCurve]:
    """The curve of every conv and linear layer of a program, for the widths, shifts and weights it has."""
    curves = {}
    nodes = program.graph.producers()
    for name, layer in program.layers.items():
        if layer.weight is None:
            continue
        node = nodes[name]
        shape = layer_shape(node, program.types, layer.weight.shape)
        times = table.times(shape)
        usable: frozenset[str] = frozenset()
        if layer.eligible and layer.n_groups:
            signed = program.qparams[node.inputs[0]].signed
            usable = layer_mechanisms(layer, signed, shape.stride, shape.dilation)
        shares, seconds = times.curve(usable)
        curves[name] = LatencyCurve(shares, seconds, times.fastest(usable)[0], times.estimated_from)
    return curves


def layerwise_seconds(curves: Sequence[LatencyCurve]) -> Callable[[FloatArray], FloatArray]:
    """Callable: low shares float64 [n, layers] -> seconds float64 [n, layers], one curve per column."""

    def seconds(shares: FloatArray) -> FloatArray:
        return np.stack([curve.at(shares[:, i]) for i, curve in enumerate(curves)], axis=1)

    return seconds


def predicted_latency(program: Program, table: LatencyTable, curves: Mapping[str, LatencyCurve]) -> dict[str, Any]:
    """JSON-able: per ratio of the program the predicted seconds per sample, and the gain as a share of the last ratio's."""
    seconds = []
    for index in range(len(program.ratios)):
        total = 0.0
        for name, curve in curves.items():
            layer = program.layers[name]
            macs = int(layer.group_macs.sum())
            low = int(layer.group_macs[layer.low[index]].sum()) if layer.n_groups else 0
            total += float(curve.at(low / macs if macs else 0.0))
        seconds.append(total)
    whole = seconds[0] - seconds[-1]
    return {
        "target": table.target,
        "cpu": table.cpu,
        "isa": table.isa,
        "threads": table.threads,
        "batch": table.batch,
        "table_sha256": table.digest,
        "ratios": list(program.ratios),
        "seconds": seconds,
        "gain_share": [(seconds[0] - t) / whole if whole > 0.0 else None for t in seconds],
        "layers": {
            name: {
                "mechanism": curve.mechanism,
                "seconds_8bit": float(curve.seconds[0]),
                "seconds_low": float(curve.seconds[-1]),
                "estimated_from": curve.estimated_from,
            }
            for name, curve in curves.items()
        },
    }
