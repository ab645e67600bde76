"""One quantized network for several sequence lengths: a program holds what differs where inputs are shorter.

Weights, shifts, groups, biases and scales are those of the longest: calibration data have its length. Instructions are made
again for every length, since positions, masks and shapes are constants of a captured network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitdial.errors import CaptureError, GraphError
from bitdial.graph.ir import Array, BatchDim
from bitdial.quantization.instructions import Contract, Instruction, MatMul
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.program import Program, Shorter

AXIS = 1  # of an input [N, length, ...]


def sequence_length(program: Program) -> int:
    """The length of a program's own inputs. Raises GraphError where none has a fixed axis 1."""
    for name in program.inputs:
        shape = program.types[name].shape
        if len(shape) > AXIS and not isinstance(shape[AXIS], BatchDim):
            return int(shape[AXIS])  # type: ignore[arg-type]
    raise GraphError("no input of the network has an axis 1 that could be the length of a sequence")


def shorten(program: Program, other: Program, length: int) -> Shorter:
    """What differs in `other`, the same network captured with shorter inputs and quantized with the same statistics.

    Raises CaptureError if it has other instructions, since tables are those of `program`.
    """
    own, theirs = ([(s.name, s.operation, s.inputs) for s in p.instructions] for p in (program, other))
    check_same(own, theirs, length)
    if program.qparams != other.qparams:
        changed = next(v for v in program.qparams if program.qparams[v] != other.qparams.get(v))
        raise CaptureError(f"at length {length} the scale of '{changed}' is another one")
    for name, layer in program.layers.items():
        theirs_8bit = other.layers[name].weight
        if layer.weight is not None and (theirs_8bit is None or not np.array_equal(layer.weight, theirs_8bit)):
            raise CaptureError(
                f"at length {length} the weights of layer '{name}' are others: they depend on the length of the inputs, so that "
                "one model cannot serve both"
            )
    return Shorter(_with_tables(program, other.instructions), other.types, _differing(program.constants, other.constants))


def check_same(own: Sequence[tuple[Any, ...]], theirs: Sequence[tuple[Any, ...]], length: int) -> None:
    """Raise CaptureError if the steps (name, operator, inputs) of a network captured with inputs of a length are other ones."""
    if own != theirs:
        at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
        name = own[at][0] if at < len(own) else theirs[at][0]
        raise CaptureError(
            f"captured with inputs of length {length} the network has other operators than at its full length (the first is "
            f"'{name}'): make the model's forward the same for both, or leave {length} out of lengths"
        )


def at_length(program: Program, length: int) -> Program:
    """The program for inputs of one of its lengths, with the layers' present tables; arrays are shared.

    Raises GraphError if it has no such length.
    """
    if length == sequence_length(program):
        return replace(program, lengths={})
    if length not in program.lengths:
        known = sorted([*program.lengths, sequence_length(program)])
        raise GraphError(f"the program has no length {length}, but {known}")
    short = program.lengths[length]
    steps, constants = _with_tables(program, short.instructions), {**program.constants, **short.constants}
    return replace(program, instructions=steps, types=short.types, constants=constants, lengths={})


def sequence_axes(program: Program) -> dict[str, int]:
    """The axis along which an input or output changes with the length, of those that have one."""
    found = {}
    for name in [*program.inputs, *program.outputs]:
        shape = program.types[name].shape
        for short in program.lengths.values():
            other = short.types[name].shape if name in short.types else shape
            axes = [i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
            if len(axes) > 1:
                raise GraphError(f"'{name}' changes along the axes {axes} with the length of the inputs, not one")
            if axes:
                found[name] = axes[0]
    return found


def _with_tables(program: Program, instructions: Sequence[Instruction]) -> list[Instruction]:
    """Instructions of a shorter length with the tables of the program's layers."""
    layers = program.layers
    return [replace(s, layer=_short_layer(layers[s.name], s)) if isinstance(s, (Contract, MatMul)) else s for s in instructions]


def _short_layer(layer: QuantizedLayer, step: Contract | MatMul) -> QuantizedLayer:
    """The layer with what a shorter sequence leaves of its work."""
    own = step.layer
    macs = layer.group_macs * own.macs // max(layer.macs, 1)  # all have the same positions
    bound = own.accumulator_bound if isinstance(step, MatMul) else layer.accumulator_bound
    return replace(layer, macs=own.macs, group_macs=macs, accumulator_bound=bound)


def _differing(full: Mapping[str, Array], short: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: array
        for name, array in short.items()
        if name not in full or full[name].dtype != array.dtype or not np.array_equal(full[name], array, equal_nan=True)
    }


