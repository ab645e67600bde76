"""Every rule that a stored program obeys. Run before writing and after reading: no file is written that would not load.

The rules are those documented at `bitdial.quantization.program` and `bitdial.graph.ir`; the graph's own go to
`bitdial.graph.verify`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ArtifactError
from bitdial.graph.ir import VALUE_DTYPES, BatchDim, Graph
from bitdial.quantization.answers import kept_answers
from bitdial.quantization.program import BLOCK_ROWS, Program, QuantizedLayer

Array = npt.NDArray[Any]
MAX_RATIOS = 255
MAX_MACS = 2**62
EXTRACTIONS = ("static", "dynamic", "naive")
GRANULARITIES = ("output", "block", "group")
LAYER_KINDS = ("conv", "linear", "matmul")
_FACTOR_COUNT = {"add": 2, "mul": 1, "mean": 1, "avg_pool": 1, "quantize": 1, "dequantize": 1}


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
    nodes = {node.name: node for node in program.graph.nodes}
    for name, layer in program.layers.items():
        node = nodes.get(name)
        if node is None or layer.name != name or layer.kind != node.op:
            raise _broken(where, f"layer '{name:.80}' matches no node of its name and kind in the graph")
        _check_layer(layer, node.attrs, len(program.ratios), f"{where}: layer '{name:.80}'")
        if program.nested and (layer.low[:-1] & ~layer.low[1:]).any():
            raise _broken(
                where, f"layer '{name:.80}' has groups that are low at a ratio but not at the next, though nested"
            )
    check_graph(program, where)
    known = {*program.graph.inputs, *nodes, *program.graph.constants}
    for value, q in program.qparams.items():
        if value not in known:
            raise _broken(where, f"encoding of '{value:.80}', which the graph does not have")
        if not math.isfinite(q.scale) or q.scale <= 0:
            raise _broken(where, f"scale {q.scale} of '{value:.80}' is not positive and finite")
        kind = program.graph.types.get(value)
        if kind is not None and kind.dtype in ("int8", "uint8") and (kind.dtype == "int8") != q.signed:
            raise _broken(
                where, f"'{value:.80}' is {kind.dtype} in the graph but its encoding says signed = {q.signed}"
            )
    for name, table in program.tables.items():
        if name not in nodes or table.shape != (256,) or table.dtype not in (np.uint8, np.int8):
            raise _broken(where, f"table '{name:.80}' belongs to no node or is not 256 8-bit entries")
    for name, factor in program.factors.items():
        if name not in nodes or factor.dtype != np.float32 or factor.ndim != 1 or not np.isfinite(factor).all():
            raise _broken(where, f"factors '{name:.80}' belong to no node or are not a finite float32 vector")
        op = nodes[name].op
        expected = len(nodes[name].inputs) if op == "concat" else _FACTOR_COUNT.get(op)
        if expected is not None and len(factor) != expected:
            raise _broken(where, f"'{name:.80}' ({op}) has {len(factor)} factors instead of {expected}")
    for node in program.graph.nodes:
        if node.op == "table" and node.name not in program.tables:
            raise _broken(where, f"node '{node.name:.80}' has no table")
        if node.op in ("quantize", "dequantize") and node.name not in program.factors:
            raise _broken(where, f"node '{node.name:.80}' ({node.op}) has no factor")
    for name in program.float_reasons:
        if name not in nodes:
            raise _broken(where, f"float reason for '{name:.80}', which is no node of the graph")


def check_ratios(ratios: list[float], where: str) -> None:
    """1 to MAX_RATIOS numbers within 0..1, each above the one before."""
    if not 1 <= len(ratios) <= MAX_RATIOS:
        raise _broken(where, f"{len(ratios)} ratios; 1 to {MAX_RATIOS} are possible")
    if not all(isinstance(r, float) and 0.0 <= r <= 1.0 for r in ratios):
        raise _broken(where, "the ratios are not all floats within 0..1")
    if not all(a < b for a, b in pairwise(ratios)):
        raise _broken(where, "the ratios are not ascending")


def _check_layer(layer: QuantizedLayer, attrs: dict[str, Any], n_ratios: int, where: str) -> None:
    def require(condition: object, problem: str) -> None:
        if not condition:
            raise _broken(where, problem)

    require(layer.weight_granularity in GRANULARITIES, f"unknown granularity {layer.weight_granularity!r:.40}")
    require(0 <= layer.accumulator_bound < 2**31, "accumulator_bound is not within int32")
    require(0 <= layer.macs <= MAX_MACS, "macs is negative or too large")
    require(math.isfinite(layer.residual_factor), "residual_factor is not finite")
    require(layer.conv_groups >= 1, "conv_groups is not positive")
    outputs = 1
    if layer.kind == "matmul":
        require(
            layer.weight is None and not layer.eligible and layer.conv_groups == 1,
            "a matmul has weights or is eligible",
        )
        require(layer.bias.shape in ((n_ratios, 0), (n_ratios, 1)), "bias of a matmul is not [n_ratios, 0 or 1]")
        require(len(layer.group_bounds) <= 1 and layer.weight_shift.size == 0, "a matmul has groups")
        require(layer.weight_scale.size == 0, "a matmul has weight scales")
        require(0 <= layer.amax <= 255 and 0 <= layer.wmax <= 127, "amax is not in 0..255 or wmax not in 0..127")
    else:
        require(layer.weight is not None, f"a {layer.kind} has no weight")
        assert layer.weight is not None
        outputs = layer.weight.shape[0] if layer.weight.ndim else 0
        rank = (2,) if layer.kind == "linear" else (3, 4, 5)
        require(layer.weight.ndim in rank and min(layer.weight.shape) > 0, "the weight has a wrong or empty shape")
        require(layer.weight.dtype == np.int8, "the weight is not int8")
        require(int(layer.weight.min()) >= -127, "a weight is -128; 8-bit weights are -127..127")
        require(layer.kind == "conv" or layer.conv_groups == 1, "a linear layer has convolution groups")
        require(attrs.get("groups", 1) == layer.conv_groups, "conv_groups differs from the node's groups")
        require(outputs % layer.conv_groups == 0, "the outputs do not divide into the convolution groups")
        require(layer.bias.shape == (n_ratios, outputs), "bias is not [n_ratios, outputs]")
        require(layer.weight_scale.shape == (outputs,), "weight_scale is not [outputs]")
        require(1 <= layer.amax <= 255 and 1 <= layer.wmax <= 127, "amax is not in 1..255 or wmax not in 1..127")
        _check_groups(layer, require)
    require(layer.bias.dtype == np.int32, "bias is not int32")
    require(layer.multiplier.shape == (outputs,), "multiplier has a wrong length")
    for field in ("weight_scale", "multiplier"):
        values: Array = getattr(layer, field)
        require(values.dtype == np.float32, f"{field} is not float32")
        require(np.isfinite(values).all() and (values >= 0).all(), f"{field} is not finite and non-negative everywhere")
    n = layer.n_groups
    require(layer.low.shape == (n_ratios, n) and layer.low.dtype == np.bool_, "low is not bool [n_ratios, n_groups]")
    require(layer.eligible or not layer.low.any(), "groups are low although the layer is not eligible")
    require(
        layer.activation_shift.shape == (n,) and layer.activation_shift.dtype == np.uint8,
        "activation_shift is malformed",
    )
    require(layer.group_macs.shape == (n,) and layer.group_macs.dtype == np.int64, "group_macs is malformed")
    require(not n or layer.activation_shift.max() <= 7, "an activation shift is above 7")
    require(not n or (layer.group_macs.min() >= 0 and float(layer.group_macs.sum(dtype=np.float64)) <= MAX_MACS),
            "group_macs is negative or too large")  # fmt: skip


def _check_groups(layer: QuantizedLayer, require: Any) -> None:
    assert layer.weight is not None
    outputs, local = layer.weight.shape[:2]
    bounds = layer.group_bounds
    require(bounds.ndim == 1 and bounds.dtype == np.int32 and len(bounds) >= 2, "group_bounds is malformed")
    require(bounds[0] == 0 and (np.diff(bounds.astype(np.int64)) > 0).all(), "group_bounds does not ascend from 0")
    require(int(bounds[-1]) == local * layer.conv_groups, "group_bounds does not end with the feature channels")
    require(layer.n_groups % layer.conv_groups == 0, "the convolution groups differ in their number of groups")
    n_local = layer.n_groups // layer.conv_groups
    borders = np.arange(layer.conv_groups, dtype=np.int64) * local
    require((bounds[:-1:n_local] == borders).all(), "a group crosses a border between convolution groups")
    cuts = np.diff(bounds).reshape(layer.conv_groups, n_local)
    require((cuts == cuts[0]).all(), "the convolution groups are cut into groups differently")
    shift = layer.weight_shift
    require(
        shift.shape == (outputs, n_local) and shift.dtype == np.uint8,
        "weight_shift is not uint8 [outputs, local groups]",
    )
    require(shift.max() <= 7, "a weight shift is above 7")
    if layer.weight_granularity != "output":
        rows = np.arange(outputs)
        tie = rows // (outputs // layer.conv_groups)
        if layer.weight_granularity == "block":
            tie = np.stack([tie, rows // BLOCK_ROWS])
        same = np.atleast_2d(tie[..., 1:] == tie[..., :-1]).all(axis=0)
        require(
            (shift[1:][same] == shift[:-1][same]).all(), "weight_shift differs within rows that its granularity ties"
        )


def check_graph(program: Program, where: str) -> None:
    """Names, operators, types and shapes, by the verifier that runs between the passes.

    Weight and bias of a quantized layer are the layer's own; what the node names, if anything, is not looked at.
    """
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
    weights = {node.weight for node in graph.nodes if node.name not in layers}
    for name, constant in graph.constants.items():
        if constant.dtype == np.uint16 and (name not in weights or name in graph.outputs):
            raise _broken(where, f"constant '{name:.80}' holds bit patterns but is not the weight of a bfloat16 layer")
    for node in graph.nodes:
        if node.name in layers and "precision" in node.attrs:
            raise _broken(where, f"layer '{node.name:.80}' runs in integers, yet names a float precision")
        stored = graph.constants.get(node.weight or "")
        if node.attrs.get("precision") == "bfloat16" and (stored is None or stored.dtype != np.uint16):
            raise _broken(where, f"bfloat16 layer '{node.name:.80}' has no weights of that precision")
        if node.op in ("conv", "linear") and node.name in layers:
            weight = layers[node.name].weight
            assert weight is not None
            node = type(node)(**vars(node))
            node.weight = f"{node.name}/weight\0"
            trial.constants[node.weight] = weight
            if node.bias is not None:
                node.bias = f"{node.name}/bias\0"
                trial.constants[node.bias] = np.broadcast_to(np.float32(0), weight.shape[:1])
        trial.nodes.append(node)
    try:
        verify(trial, program.qparams.keys())
    except RecursionError:
        raise
    except Exception as error:  # the verifier trusts attribute types; whatever a hostile one trips over means the same
        raise _broken(where, f"graph: {error}" if str(error) else f"graph: {error!r}") from error


def _is_dim(dim: Any) -> bool:
    size = dim.factor if isinstance(dim, BatchDim) else dim
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**40 and (size > 0 or dim is size)


def _broken(where: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{where}: {problem}; get a sound copy of the file, or quantize and save the model again")
