"""Which values are 8-bit, which are float, which are unsigned: decided from the graph alone.

A value is 8-bit when its producer can deliver 8 bits and at least one reader wants them. Readers that do not want them
get a `dequantize`; integer readers of float values get a `quantize`. Found by starting from "everything" and removing
until nothing changes, so that chains without an integer reader (the residual stream of a transformer, read by LayerNorm)
end up in float as a whole.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from bitdial.graph.ir import Graph, Node
from bitdial.graph.operators import CONTRACTIONS, OPERATORS, kind_of

_ATEN_SIGN = {"aten._safe_softmax.default": "always"}


def non_negative_values(graph: Graph) -> set[str]:
    """Values that the graph proves to be >= 0 (never what calibration happened to see)."""
    proven = {name for name, array in graph.constants.items() if array.dtype.kind == "f" and bool((array >= 0).all())}
    for node in graph.nodes:
        activation = node.attrs.get("activation")
        clamped = node.op == "clamp" and node.attrs["lo"] >= 0.0
        fused = activation is not None and (activation["kind"] == "relu" or activation.get("lo", -1.0) >= 0.0)
        sign = OPERATORS[node.op].non_negative if node.op in OPERATORS else _ATEN_SIGN.get(node.op)
        lifted = node.op in OPERATORS and 0.0 < OPERATORS[node.op].depth <= node.attrs.get("raised", 0.0)
        inherits = sign == "inputs" and all(v in proven for v in node.inputs)
        if node.op == "pad":
            inherits = inherits and node.attrs.get("value", 0.0) >= 0.0
        if sign == "always" or clamped or fused or lifted or inherits:
            proven.add(node.name)
    return proven


def matches(node: Node, patterns: tuple[str, ...]) -> str | None:
    """The first glob pattern that the node's module path or name fits."""
    return next((p for p in patterns if fnmatchcase(node.source, p) or fnmatchcase(node.name, p)), None)


def integer_layers(graph: Graph, ignored: tuple[str, ...]) -> set[str]:
    """Names of the conv, linear and matmul nodes that run in integers (all but those the user, or a precision attribute,
    keeps in float)."""
    return {
        n.name for n in graph.nodes if n.op in CONTRACTIONS and "precision" not in n.attrs and matches(n, ignored) is None
    }


def eight_bit_values(graph: Graph, layers: set[str], ignored: tuple[str, ...] = ()) -> set[str]:
    """Names of the node outputs that are 8-bit."""
    capable = {n.name: n for n in graph.nodes if _can_deliver(n, graph, layers) and matches(n, ignored) is None}
    values = set(capable) - set(graph.outputs)
    consumers = graph.consumers()
    changed = True
    while changed:
        changed = False
        for name in [v for v in capable if v in values]:
            node = capable[name]
            needs_inputs = node.op not in CONTRACTIONS and not pads_input(node, graph)
            if (needs_inputs and not all(v in values for v in node.data_operands())) or not any(
                _wants(reader, name, values, layers) for reader in consumers[name]
            ):
                values.discard(name)
                changed = True
    return values


def pads_input(node: Node, graph: Graph) -> bool:
    """Whether a node pads an input of the graph: the input is quantized before that, with the same result."""
    return node.op == "pad" and node.inputs[0] in graph.inputs


def _can_deliver(node: Node, graph: Graph, layers: set[str]) -> bool:
    if graph.types[node.name].dtype != "float32":
        return False
    if node.op in CONTRACTIONS:
        return node.name in layers
    if node.op == "avg_pool":
        a = node.attrs
        plain = not a["ceil_mode"] and (a["padding"] == [0, 0] or a["count_include_pad"])
        return plain  # windows of one size: one factor
    if node.op == "pad":
        return bool(node.attrs.get("value", 0.0) == 0.0)
    if node.op in ("add", "mul"):
        return not any(graph.is_constant(v) for v in node.inputs)
    return kind_of(node.op) in ("unary", "movement") or node.op in ("concat", "mean")


def _wants(reader: Node, value: str, values: set[str], layers: set[str]) -> bool:
    if reader.op in CONTRACTIONS and reader.name in layers:
        return value in reader.inputs or reader.name in values  # as a residual only if the result is 8-bit too
    return reader.name in values


def ends(graph: Graph, layers: set[str]) -> tuple[set[str], set[str]]:
    """First layers (reached from a graph input without passing another layer) and last ones (reaching an output so)."""
    producers = graph.producers()

    def front(value: str, seen: set[str]) -> set[str]:
        """Layers met first when walking backwards from a value; '' where a graph input is met."""
        if value in seen:
            return set()
        seen.add(value)
        node = producers.get(value)
        if node is None:
            return {""} if value in graph.inputs else set()
        if node.name in layers:
            return {node.name}
        return set().union(*(front(v, seen) for v in node.data_operands()), set())

    first = {n.name for n in graph.nodes if n.name in layers and n.op != "matmul" and "" in front(n.inputs[0], set())}
    last: set[str] = set()
    for output in graph.outputs:
        last |= front(output, set())
    for name in list(last & layers):  # heads whose results are added: the add is fused into one of them
        other = producers.get(producers[name].residual or "")
        if other is not None and other.name in layers and "activation" not in other.attrs:
            last.add(other.name)
    return first, last - {""}


def float_reason(node: Node, graph: Graph, ignored: tuple[str, ...]) -> str:
    """Why a node runs in float, for reports."""
    pattern = matches(node, ignored)
    if pattern is not None:
        return f"ignored pattern '{pattern}'"
    if "precision" in node.attrs:
        return f"{node.attrs['precision']} layer"
    if kind_of(node.op) == "aten":
        return "no 8-bit form of this operator"
    if kind_of(node.op) == "normalization":
        return "normalisation stays in float"
    if any(graph.is_constant(v) for v in node.inputs):
        return "combines with a float constant"
    if node.op == "avg_pool":
        return "windows of differing size"
    return "between float operators"


def layer_kinds(node: Node, graph: Graph) -> dict[str, Any]:
    """Convolution groups, feature channels and depthwise flag of a conv or linear node."""
    assert node.weight is not None
    weight = graph.constants[node.weight]
    groups = int(node.attrs.get("groups", 1)) if node.op == "conv" else 1
    channels = int(weight.shape[1]) * groups
    return {"conv_groups": groups, "channels": channels, "depthwise": groups > 1 and int(weight.shape[1]) == 1}
