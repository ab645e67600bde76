"""The rules of a stored program that no single instruction can know. Run before writing and after reading: no file is written
that would not load.

What an instruction and its layer know of themselves is checked by their own `check`; names, shapes and types by
`bitdial.graph.verify`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from bitdial.errors import ArtifactError, GraphError
from bitdial.graph.ir import VALUE_DTYPES, BatchDim, Dim, Graph
from bitdial.quantization.answers import kept_answers
from bitdial.quantization.instructions import (
    Contract,
    Dequantize,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Quantize,
    Rounding,
)
from bitdial.quantization.layer import QuantizedLayer
from bitdial.quantization.lengths import at_length, sequence_axes, sequence_length
from bitdial.quantization.program import Program
from bitdial.quantization.weights import accumulator_bound, largest_magnitudes

MAX_RATIOS = 255
EXTRACTIONS = ("static", "dynamic", "naive")


def check_program(program: Program, where: str) -> None:
    """Raise ArtifactError, naming `where`, the thing and the remedy, if the program breaks a rule."""
    check_ratios(program.ratios, where)
    try:
        kept = kept_answers(program)
    except (TypeError, ValueError) as error:
        raise _broken(where, f"the record of kept answers is malformed: {error}") from error
    if kept is not None and list(kept.ratios) != list(program.ratios):
        raise _broken(where, "the record of kept answers is of other ratios")
    if program.extraction not in EXTRACTIONS:
        raise _broken(where, f"extraction is {program.extraction!r:.40}, not one of {', '.join(EXTRACTIONS)}")
    for step in program.instructions:
        try:
            step.check()
        except GraphError as error:
            raise _broken(where, str(error)) from error
        if isinstance(step, (Contract, MatMul)):
            _check_ratios_of(step.layer, program, where)
    check_graph(program, where)
    known = {*program.inputs, *program.constants, *(step.name for step in program.instructions)}
    for value, q in program.qparams.items():
        if value not in known:
            raise _broken(where, f"encoding of '{value:.80}', which the program does not have")
        if not math.isfinite(q.scale) or q.scale <= 0:
            raise _broken(where, f"scale {q.scale} of '{value:.80}' is not positive and finite")
        if value in program.types and program.types[value].dtype != ("int8" if q.signed else "uint8"):
            kind = program.types[value].dtype
            raise _broken(where, f"'{value:.80}' is {kind} but its encoding says signed = {q.signed}")
    _check_lengths(program, where)
    for step in program.instructions:
        problem = _disagreement(step, program) or _overflow(step, program)
        if problem is not None:
            raise _broken(where, f"'{step.name:.80}' ({step.operation:.40}): {problem}")


def _check_lengths(program: Program, where: str) -> None:
    if not program.lengths:
        return
    try:
        full = sequence_length(program)
        for length in program.lengths:
            own = at_length(program, length)
            if not length < full or sequence_length(own) != length:
                raise _broken(where, f"length {length} is not that of its inputs, or not below the full {full}")
            check_program(own, f"{where}: length {length}")
        sequence_axes(program)
    except (GraphError, ValueError) as error:
        raise _broken(where, f"its shorter lengths do not fit: {error}") from error


def _check_ratios_of(layer: QuantizedLayer, program: Program, where: str) -> None:
    if len(layer.low) != len(program.ratios):
        raise _broken(where, f"layer '{layer.name:.80}': its low groups and bias are not of the program's ratios")
    if program.nested and (layer.low[:-1] & ~layer.low[1:]).any():
        raise _broken(
            where, f"layer '{layer.name:.80}' has groups that are low at a ratio but not at the next, though nested"
        )


def _disagreement(step: Instruction, program: Program) -> str | None:
    """What is wrong with an instruction among the encodings of its values, None where nothing is."""
    result = program.qparams.get(step.name)
    integer = not isinstance(step, Float) and not isinstance(step, Quantize)
    for value in step.inputs:
        if integer and value not in program.qparams:
            return f"it reads '{value:.80}', which is not 8-bit"
    to_float = isinstance(step, (Float, Dequantize)) or (isinstance(step, (Contract, MatMul)) and step.clamp is None)
    if to_float != (result is None):
        return "its result has an encoding but is float, or none though it is 8-bit"
    residual = step.residual if isinstance(step, Contract) else None
    if residual is not None and (residual in program.qparams) != (result is not None):
        return "its residual is 8-bit and its result float, or the reverse"
    if result is None:
        return None
    if isinstance(step, (MaxPool, Move)):
        same = program.qparams[step.inputs[0]].signed == result.signed
        return None if same else "its input and its result differ in sign"
    if isinstance(step, Lookup):
        if step.offset != (128 if program.qparams[step.inputs[0]].signed else 0):
            return f"its offset {step.offset} does not go with its input"
        if step.table.dtype != (np.int8 if result.signed else np.uint8):
            return f"its table is {step.table.dtype}, its encoding says signed = {result.signed}"
    limits = (step.lo, step.hi) if isinstance(step, Rounding) else step.clamp if isinstance(step, (Contract, MatMul)) else None
    assert limits is not None
    inside = result.qmin <= limits[0] <= limits[1] <= result.qmax
    return None if inside else f"it clamps to {limits[0]}..{limits[1]}, beyond its encoding"


def _overflow(step: Instruction, program: Program) -> str | None:
    """What is wrong with the accumulator bound of a layer that has low weights of its own."""
    if not isinstance(step, Contract) or step.layer.low_weight is None:
        return None
    bound = accumulator_bound(largest_magnitudes(step.layer), program.qparams[step.inputs[0]])
    return None if bound <= step.layer.accumulator_bound else f"its accumulators reach {bound}, beyond its accumulator_bound"


def check_ratios(ratios: list[float], where: str) -> None:
    """1 to MAX_RATIOS numbers within 0..1, each above the one before."""
    if not 1 <= len(ratios) <= MAX_RATIOS:
        raise _broken(where, f"{len(ratios)} ratios; 1 to {MAX_RATIOS} are possible")
    if not all(isinstance(r, float) and 0.0 <= r <= 1.0 for r in ratios):
        raise _broken(where, "the ratios are not all floats within 0..1")
    if not all(a < b for a, b in pairwise(ratios)):
        raise _broken(where, "the ratios are not ascending")


def check_graph(program: Program, where: str) -> None:
    """Names, operators, types and shapes, by the verifier that runs between the passes."""
    from bitdial.graph.verify import verify  # late: it brings the list of float operators, which only a check needs

    graph, layers = program.graph, program.layers
    for name, kind in graph.types.items():
        if kind.dtype not in VALUE_DTYPES or not all(_is_dim(d) for d in kind.shape):
            raise _broken(where, f"type of '{name:.80}' is malformed")
    for name, constant in graph.constants.items():
        if constant.dtype.kind == "f" and not np.all((constant == constant) & (constant < np.inf)):
            raise _broken(where, f"constant '{name:.80}' holds NaN or +inf")
        recorded = graph.types.get(name)
        if recorded is not None and recorded.shape != constant.shape:
            raise _broken(where, f"constant '{name:.80}' has another shape than its type")
    trial = Graph(list(graph.inputs), list(graph.outputs), [], dict(graph.constants), graph.types, graph.structure)
    weights = {node.weight for node in graph.nodes}
    for name, constant in graph.constants.items():
        if constant.dtype == np.uint16 and (name not in weights or name in graph.outputs):
            raise _broken(where, f"constant '{name:.80}' holds bit patterns but is not the weight of a bfloat16 layer")
    for node in graph.nodes:
        if node.weight is not None and node.weight not in graph.constants:
            raise _broken(where, f"'{node.name:.80}' names weights that are not there")
        if node.attrs.get("precision") == "bfloat16" and graph.constants[node.weight or ""].dtype != np.uint16:
            raise _broken(where, f"bfloat16 layer '{node.name:.80}' has no weights of that precision")
        if node.name in layers and node.op != "matmul":
            weight = layers[node.name].weight
            assert weight is not None
            node = type(node)(**vars(node))
            node.weight = f"{node.name}/weight\0"
            trial.constants[node.weight] = weight
        trial.nodes.append(node)
    try:
        verify(trial, program.qparams.keys())
    except RecursionError:
        raise
    except Exception as error:  # the verifier trusts attribute types; whatever a hostile one trips over means the same
        raise _broken(where, f"graph: {error}" if str(error) else f"graph: {error!r}") from error


def _is_dim(dim: Dim) -> bool:
    size = dim.factor if isinstance(dim, BatchDim) else dim
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40 and (size > 0 or dim is size)


def _broken(where: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{ArtifactError.damaged(where, problem)}, or quantize and save the model again")
