"""What it takes to change a method's width at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitdial.quantization.program import Program

FLOAT_BYTES = 4  # scales, multipliers and biases


@dataclass(frozen=True)
class Switching:
    """how       "fixed": another width is another model; "tables": one set of weights, other tables per width
    cost      what is kept beside one model, in words
    bytes     that cost for the widths that were built (weights of 4 bits packed two to a byte)
    in_time   the switch is a store or the choice of other tables: nothing is converted or copied
    """

    how: str
    cost: str
    bytes: int
    in_time: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def one_model() -> Switching:
    return Switching("fixed", "a single width: nothing to switch to", 0, False)


def copies(programs: Sequence[Program]) -> Switching:
    """A copy of the weights per width: every layer's distinct weight tensors beyond the largest, with their scales and biases."""
    extra = 0
    layers = {name for program in programs for name, layer in program.layers.items() if layer.weight is not None}
    for name in layers:
        found: dict[bytes, tuple[float, int]] = {}
        for program in programs:
            layer = program.layers[name]
            assert layer.weight is not None
            whole_low = bool(layer.low[0].all()) and layer.n_groups > 0 and not layer.weight_shift.any()
            bits = layer.wmax.bit_length() + 1 if whole_low else 8
            found[layer.weight.tobytes()] = (layer.weight.size * bits / 8, 3 * FLOAT_BYTES * len(layer.weight))
        if len(found) > 1:
            weights = sorted(size for size, _ in found.values())
            extra += int(sum(weights[:-1])) + sum(tables for _, tables in list(found.values())[1:])
    return Switching("fixed", "a copy of the weights per width, with scales and biases", extra, False)


def dial(program: Program) -> Switching:
    """bitdial's dial: masks and a row of the bias table per further ratio."""
    rows = len(program.ratios) - 1
    size = sum(FLOAT_BYTES * layer.bias.shape[1] + (layer.n_groups + 7) // 8 for layer in program.layers.values())
    return Switching("tables", "a row of the bias table and a mask of groups per ratio", rows * size, True)


def tables(programs: Sequence[Program], per_output: int, per_tensor: int, cost: str) -> Switching:
    """One set of weights whose low widths are derived at run time, and vectors per width.

    per_output, per_tensor: numbers of 4 bytes per output channel and per activation tensor of every further width.
    """
    outputs = sum(len(x.weight) for x in programs[0].layers.values() if x.weight is not None)
    tensors = sum(x.eligible for x in programs[0].layers.values())
    size = FLOAT_BYTES * (per_output * outputs + per_tensor * tensors) * (len(programs) - 1)
    return Switching("tables", cost, size, True)
