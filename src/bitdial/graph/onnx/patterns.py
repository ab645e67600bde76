"""Operations that ONNX writes in parts, put together again, so that an imported network has the layers it was written with.

Functions and norms first (`bitdial.graph.onnx.functions`), then, here, layers and movements: biases, scaled and masked attention
scores, selections, rolls. Each rewrite changes one node to the whole operation and leaves its parts to be dropped where nothing
else reads them.
"""

from __future__ import annotations

import numpy as np

from bitdial.graph.ir import Array, Graph, Node
from bitdial.graph.onnx import functions
from bitdial.graph.onnx.matching import Matcher, Rewrite
from bitdial.graph.passes.edit import drop_unused, fresh_constant, rename_value

# ---- layers


def _channels(m: Matcher, layer: Node, array: Array) -> Array | None:
    """A constant that is combined with a layer's result, as one number per output channel; None where it is not."""
    rank = m.graph.types[layer.name].ndim
    channels = m.graph.constants[layer.weight or ""].shape[0]
    axis = 1 if layer.op == "conv" else rank - 1
    full = (1,) * (rank - array.ndim) + array.shape
    if array.dtype != np.float32 or len(full) != rank or any(d != 1 for i, d in enumerate(full) if i != axis):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)) if full[axis] in (1, channels) else None


def _into_layer(m: Matcher, node: Node) -> bool:
    """A constant per channel, added to or multiplied with what only a conv or linear layer gives, belongs to the layer."""
    for value, other in (node.inputs, node.inputs[::-1]):
        layer, array = m.of(value, "conv", "linear"), m.graph.constants.get(other)
        if layer is None or array is None or layer.weight is None or m.readers[value] != 1 or layer.residual is not None:
            continue
        own = _channels(m, layer, array)
        if own is None or m.graph.types[node.name] != m.graph.types[value]:
            continue
        weight = m.graph.constants[layer.weight]
        bias = m.graph.constants[layer.bias].astype(np.float64) if layer.bias is not None else np.zeros(len(weight))
        if node.op == "mul":
            scaled = weight * own.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float64)
            layer.weight = fresh_constant(m.graph, layer.weight, scaled.astype(np.float32))
        if node.op == "add" or layer.bias is not None:
            bias = bias + own if node.op == "add" else bias * own
            layer.bias = fresh_constant(m.graph, f"{layer.name}_bias", bias.astype(np.float32))
        rename_value(m.graph, node.name, layer.name)
        m.graph.nodes.remove(node)
        return True
    return False


def _attention_scores(m: Matcher, node: Node) -> bool:
    """Numbers that scale a matrix product or its operands become its scale; a transposed second operand its transpose_b."""
    changed = False
    for position in (0, 1):
        value = node.inputs[position]
        found = m.with_scalar(value, "mul")
        if found is not None and m.graph.types[found[0]] == m.graph.types[value]:
            node.inputs[position] = found[0]
            node.attrs["scale"] = float(node.attrs.get("scale", 1.0)) * found[1]
            changed = True
    turned = m.of(node.inputs[1], "permute")
    if turned is not None and not node.attrs.get("transpose_b"):
        scaled = m.with_scalar(turned.inputs[0], "mul")
        axes = list(turned.attrs["axes"])
        swapped = [*axes[:-2], axes[-1], axes[-2]]
        if swapped[-1] == len(axes) - 1:  # so that both operands are read along their last axis
            if scaled is not None and m.graph.types[scaled[0]] != m.graph.types[turned.inputs[0]]:
                scaled = None
            source = scaled[0] if scaled is not None else turned.inputs[0]
            if scaled is not None:
                node.attrs["scale"] = float(node.attrs.get("scale", 1.0)) * scaled[1]
            if swapped == list(range(len(axes))):
                node.inputs[1] = source
            else:
                shape = m.graph.types[turned.inputs[0]].shape
                name = f"{node.name}_keys"
                while name in m.graph.types or name in m.graph.constants:
                    name += "_"
                kind = m.graph.types[turned.name]
                m.graph.types[name] = type(kind)(tuple(shape[i] for i in swapped), kind.dtype)
                inner = Node(name, "permute", [source], {"axes": swapped}, source=turned.source)
                m.graph.nodes.insert(m.graph.nodes.index(node), inner)
                node.inputs[1] = name
            node.attrs["transpose_b"] = True
            changed = True
    return changed


def _scaled_product(m: Matcher, node: Node) -> bool:
    """A number times a matrix product that nothing else reads is the product's scale."""
    found = m.with_scalar(node.name, "mul")
    product = m.of(found[0], "matmul") if found is not None else None
    if found is None or product is None or m.readers[found[0]] != 1 or m.graph.types[node.name] != m.graph.types[found[0]]:
        return False
    product.attrs["scale"] = float(product.attrs.get("scale", 1.0)) * found[1]
    rename_value(m.graph, node.name, product.name)
    m.graph.nodes.remove(node)
    return True


# ---- movements and masks


def _select(m: Matcher, node: Node) -> bool:
    """One position of an axis, and the axis removed."""
    cut = m.of(node.inputs[0], "slice")
    if cut is None or cut.attrs["stop"] - cut.attrs["start"] != 1:
        return False
    axis, shape = cut.attrs["axis"], m.graph.types[cut.name].shape
    if m.graph.types[node.name].shape != (*shape[:axis], *shape[axis + 1 :]):
        return False
    node.op, node.inputs, node.attrs = "select", list(cut.inputs), {"axis": axis, "index": cut.attrs["start"]}
    return True


def _roll(m: Matcher, node: Node) -> bool:
    """The end of an axis before its beginning."""
    if len(node.inputs) != 2 or "activation" in node.attrs:
        return False
    ends = [m.of(v, "slice") for v in node.inputs]
    first, second = ends
    if first is None or second is None or first.inputs != second.inputs or first.inputs[0] in m.graph.constants:
        return False
    axis, a, b = node.attrs["axis"], first.attrs, second.attrs
    n = m.graph.types[first.inputs[0]].shape[axis]
    same = a["axis"] == b["axis"] == axis and a["step"] == b["step"] == 1
    if not same or (a["stop"], b["start"], a["start"]) != (n, 0, b["stop"]):
        return False
    node.op, node.inputs, node.attrs = "roll", list(first.inputs), {"shifts": [-a["start"]], "axes": [axis]}
    return True


_BARRED = np.float32(-1e30)  # instead of -infinity: softmax gives exactly 0 for it, and stored values stay finite


def _mask(m: Matcher, softmax: Node) -> tuple[Node, str] | None:
    """The addition of a constant mask before a softmax over the last axis, and the mask's name."""
    add = m.of(softmax.inputs[0], "add")
    if add is None or softmax.attrs["axis"] != m.graph.types[softmax.name].ndim - 1:
        return None
    mask = next((v for v in add.inputs if v in m.graph.constants and m.graph.constants[v].ndim), None)
    return None if mask is None or set(add.inputs) == {mask} else (add, mask)


def _finite_mask(m: Matcher, node: Node) -> bool:
    """-infinity in a mask, where no row is barred altogether, is a large negative number."""
    found = _mask(m, node)
    if found is None or m.readers[found[0].name] != 1:
        return False
    add, mask = found
    array = m.graph.constants[mask]
    barred = np.isneginf(array)
    if not barred.any() or barred.all(axis=-1).any():
        return False
    finite = fresh_constant(m.graph, mask, np.where(barred, _BARRED, array))
    add.inputs = [finite if v == mask else v for v in add.inputs]
    return True


def _safe_softmax(m: Matcher, node: Node) -> bool:
    """where(isnan(softmax), 0, softmax): 0 for queries that may attend to nothing."""
    if node.attrs["args"] != [{"value": 0}, {"value": 1}, {"value": 2}]:
        return False
    test, zero, value = node.inputs
    isnan, softmax = m.of(test, "aten.isnan.default"), m.of(value, "softmax")
    if isnan is None or softmax is None or isnan.inputs != [value] or m.scalar(zero) != 0.0:
        return False
    if m.graph.types[node.name] != m.graph.types[value]:
        return False
    found = _mask(m, softmax)
    rows = np.isneginf(m.graph.constants[found[1]]).all(axis=-1) if found is not None else None
    if rows is not None and not rows.any() and m.of(next(v for v in found[0].inputs if v != found[1]), "matmul"):  # type: ignore[index]
        rename_value(m.graph, node.name, value)
        m.graph.nodes.remove(node)
        return True
    axis = softmax.attrs["axis"] - m.graph.types[value].ndim
    node.op, node.inputs = "aten._safe_softmax.default", list(softmax.inputs)
    node.attrs = {"args": [{"value": 0}, axis], "kwargs": {}}
    return True


_REWRITES: tuple[tuple[str, Rewrite], ...] = (
    ("mul", _scaled_product),
    ("mul", _into_layer),
    ("add", _into_layer),
    ("matmul", _attention_scores),
    ("reshape", _select),
    ("concat", _roll),
    ("aten.where.self", _safe_softmax),
    ("softmax", _finite_mask),
)


def recognize(graph: Graph) -> Graph:
    """The graph with decomposed operations whole. The graph given is changed."""
    drop_unused(graph)
    for rewrites in (functions.REWRITES, _REWRITES):
        matcher = Matcher(graph)
        for node in list(graph.nodes):
            for op, rewrite in rewrites:
                if node.op == op and rewrite(matcher, node):
                    matcher = Matcher(graph)
                    break
        drop_unused(graph)
    return graph
