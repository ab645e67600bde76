"""What each operator does to labels (see `bitdial.layout.propagate`)."""

from __future__ import annotations

import numpy as np

from bitdial.graph.ir import Node
from bitdial.layout import labels as lb
from bitdial.layout.aten_rules import ATEN_RULES
from bitdial.layout.labels import FROZEN, ZERO, Ids, Labels
from bitdial.layout.propagate import Contraction, Follower, Rule, Run, elementwise, keeps_zero, operand_slots


def one_axis(run: Run, labels: Labels, axis: int) -> Labels:
    """The labels of one axis, which moves, as a value of that axis alone; other axes are tied."""
    tied = run.state.tie_across(labels, [axis])
    for other in reversed(range(len(tied.axes))):
        if other != axis:
            tied = lb.drop_axis(tied, other)
    return tied


def flat_ids(labels: Labels) -> Ids:
    """Labels of a one-axis value, [size of the axis]."""
    return np.broadcast_to(labels.ids, labels.sizes).reshape(-1)


def contract(run: Run, node: Node, axis: int, groups: int) -> Labels | None:
    """Let a conv or linear layer sum over `axis` of its input; its weight columns are permuted like the input."""
    value = node.inputs[0]
    labels = run.value(value)
    if labels.moving is None:
        return None
    if labels.moving_axis != axis:
        run.soft(node.name, 0, value, f"'{node.name}' contracts another axis than the one that moves")
        return None
    if groups > 1:
        # the channels of every convolution group must stay in it
        sizes = labels.shape
        cut = lb.reshape(labels, (*sizes[:axis], groups, sizes[axis] // groups, *sizes[axis + 1 :]))
        if cut is None or cut.moving_axis != axis + 1:
            run.soft(node.name, 0, value, f"the convolution groups of '{node.name}' cut across its channels")
            return None
        run.state.windows.append((value, cut.rows()))
    labels = one_axis(run, labels, axis)
    run.state.contractions[node.name] = Contraction(node.name, value, axis, labels)
    return labels


def conv(run: Run, node: Node) -> Labels:
    assert node.weight is not None
    groups = int(node.attrs["groups"])
    channels = run.shape(node.inputs[0])[1]
    shape = run.shape(node.name)
    if groups == channels and groups > 1:
        out = depthwise(run, node)
    else:
        columns = contract(run, node, 1, groups)
        run.tie_shared(node.weight, "columns", columns)
        out = lb.along(shape, 1, run.state.fresh(shape[1]))
        if groups > 1 and out.moving is not None:
            run.state.windows.append((node.name, out.rows().reshape(groups, -1)))
        run.tie_shared(node.weight, "rows", out if out.moving is None else one_axis(run, out, 1))
    return finish(run, node, out)


def depthwise(run: Run, node: Node) -> Labels:
    """One filter (or m filters) per channel: output channels move with the input's; weight and bias follow."""
    assert node.weight is not None
    value, shape = node.inputs[0], run.shape(node.name)
    labels = run.value(value)
    if labels.moving_axis != 1:
        if labels.moving is not None:
            run.soft(
                node.name, 0, value, f"'{node.name}' is a depthwise conv over another axis than the one that moves"
            )
        run.tie_shared(node.weight, "rows", None)
        return run.unlabelled(node)
    axis = one_axis(run, labels, 1)
    ids = np.where(axis.ids == ZERO, FROZEN, axis.ids)  # a filter turns a padded zero into its bias
    multiplier = shape[1] // run.shape(value)[1]
    sub = axis.axes[0]
    if multiplier > 1:
        sub, ids = (*sub, multiplier), ids[..., None]
    run.tie_shared(node.weight, "rows", Labels((sub,), ids, axis.moving))
    base = lb.unlabelled(shape)
    axes = (base.axes[0], sub, *base.axes[2:])
    lead, tail = len(axes[0]), sum(map(len, axes[2:]))
    assert axis.moving is not None
    run.flow(node, value, node.name)
    return Labels(axes, ids.reshape((1,) * lead + ids.shape + (1,) * tail), axis.moving + lead)


def linear(run: Run, node: Node) -> Labels:
    assert node.weight is not None
    shape = run.shape(node.name)
    last = len(shape) - 1
    columns = contract(run, node, last, 1)
    run.tie_shared(node.weight, "columns", columns)
    out = lb.along(shape, last, run.state.fresh(shape[last]))
    run.tie_shared(node.weight, "rows", out if out.moving is None else one_axis(run, out, last))
    return finish(run, node, out)


def finish(run: Run, node: Node, out: Labels) -> Labels:
    """Tie a layer's output to its residual; forget zeros that the activation changes."""
    if node.residual is not None and not run.is_constant(node.residual):
        run.state.labels[node.name] = out
        out = elementwise(run, node, [(-1, node.name), ("residual", node.residual)])
    elif node.residual is not None and out.moving is not None:
        rank = len(run.shape(node.residual))
        offset = len(run.shape(node.name)) - rank
        axes = tuple(range(offset, offset + rank))
        run.state.followers.append(Follower(node.name, "residual", node.name, axes))
    return run.no_zeros(out, keeps_zero(node.attrs.get("activation")))


def matmul(run: Run, node: Node) -> Labels:
    """Attention: a contraction ties both sides (per head); the rows of a and the columns of b carry on."""
    name_a, name_b = node.inputs
    a, b = run.value(name_a), run.value(name_b)
    if len(a.axes) < 2 or len(b.axes) < 2:
        return run.give_up(node, f"'{node.name}' multiplies by a vector")
    if not node.attrs.get("transpose_b"):
        order = list(range(len(b.axes)))
        order[-1], order[-2] = order[-2], order[-1]
        b = lb.permute(b, order)
    # from here on a is [..., M, K] and b is [..., L, K]
    ka, kb = len(a.axes) - 1, len(b.axes) - 1
    if a.moving_axis == ka or b.moving_axis == kb:
        if a.moving_axis == ka and b.moving_axis == kb:
            batch_a, batch_b = list(range(ka - 1)), list(range(kb - 1))
            ra = lb.drop_axis(run.state.tie_across(a, [*batch_a, ka]), ka - 1)
            rb = lb.drop_axis(run.state.tie_across(b, [*batch_b, kb]), kb - 1)
            pair = lb.align([ra, rb])
            if pair is not None and pair[0].moving == pair[1].moving:
                reason = f"'{node.name}' contracts it with channels that keep their order"
                run.state.tie(pair[0].ids, pair[1].ids, reason)
                run.flow(node, name_a, name_b)
                return run.unlabelled(node)
        for side, k in ((a, ka), (b, kb)):
            if side.moving_axis == k:
                run.state.freeze(side.ids, f"'{node.name}' contracts it with channels arranged differently")
        a = a if a.moving_axis != ka else lb.unlabelled(a.shape)
        b = b if b.moving_axis != kb else lb.unlabelled(b.shape)
    shape = run.shape(node.name)
    rank = len(shape)
    for name, side, k in ((name_a, a, ka), (name_b, b, kb)):
        if side.moving is None:
            continue
        if side.moving_axis != k - 1:
            run.state.freeze(side.ids, f"'{node.name}' multiplies along another axis than the one that moves")
            continue
        if side is a and b.moving is not None:
            run.state.freeze(a.ids, f"'{node.name}' moves along its columns")
            continue
        kept = lb.drop_axis(run.state.tie_across(side, range(k)), k)
        rows = k - 1
        if side is b:
            # the columns of the result: put an M axis before them
            kept = Labels((*kept.axes[:rows], (), kept.axes[rows]), kept.ids, kept.moving)
        else:
            kept = Labels((*kept.axes, ()), kept.ids, kept.moving)
        out = lb.expand(kept, shape) if len(kept.axes) <= rank else None
        if out is None:
            run.state.freeze(side.ids, f"'{node.name}' broadcasts it along the axis that moves")
            continue
        run.flow(node, name, node.name)
        return run.no_zeros(out, keeps_zero(node.attrs.get("activation")))
    return run.unlabelled(node)


def add(run: Run, node: Node) -> Labels:
    out = elementwise(run, node, operand_slots(node))
    return run.no_zeros(out, keeps_zero(node.attrs.get("activation")))


def mul(run: Run, node: Node) -> Labels:
    return elementwise(run, node, operand_slots(node), product=True)


def batch_norm(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    run.flow(node, node.inputs[0], node.name)
    return _affine(run, node, x, [1])


def layer_norm(run: Run, node: Node) -> Labels:
    """Mean and variance do not depend on the order (only their rounding does); weight and bias follow."""
    x = run.value(node.inputs[0])
    rank = len(x.axes)
    normalized = list(range(rank - len(node.attrs["normalized_shape"]), rank))
    run.flow(node, node.inputs[0], node.name)
    return _affine(run, node, x, normalized)


def _affine(run: Run, node: Node, x: Labels, axes: list[int]) -> Labels:
    """Parameters over `axes` of x: they are read by every position of the other axes alike."""
    if x.moving is None:
        return x
    parameters = node.inputs[1:]
    if any(not run.is_constant(p) for p in parameters):
        return run.give_up(node, f"the parameters of '{node.name}' are computed")
    if parameters and x.moving_axis in axes:
        x = run.state.tie_across(x, axes)
        for i in range(len(parameters)):
            run.state.followers.append(Follower(node.name, str(i + 1), node.name, tuple(axes)))
    elif x.moving_axis not in axes:
        # the statistics mix positions of the normalized axes, so the moving axis must move alike at all of them
        x = run.state.tie_across(x, [i for i in range(len(x.axes)) if i not in axes])
    return run.no_zeros(x, keep=False)


def softmax(run: Run, node: Node) -> Labels:
    """Along the moving axis: permuted results (rounding apart). Along another axis: the moving one is not mixed."""
    run.flow(node, node.inputs[0], node.name)
    x = run.value(node.inputs[0])
    if x.moving is not None and x.moving_axis != node.attrs["axis"]:
        x = run.state.tie_across(x, [i for i in range(len(x.axes)) if i != node.attrs["axis"]])
    return run.no_zeros(x, keep=False)


def pool(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    if x.moving is None:
        return x
    rank = len(x.axes)
    window = range(rank - len(node.attrs["kernel"]), rank)
    if x.moving_axis in window:
        return run.give_up(node, f"'{node.name}' pools along the axis that moves")
    run.flow(node, node.inputs[0], node.name)
    x = run.state.tie_across(x, [i for i in range(rank) if i not in window])
    for axis in window:
        resized = lb.resize_axis(x, axis, run.shape(node.name)[axis])
        assert resized is not None  # the labels do not vary there any more
        x = resized
    return x


def mean(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    axes = list(node.attrs["axes"])
    if x.moving is None or x.moving_axis in axes:
        return run.unlabelled(node)  # a mean over all channels does not depend on their order
    run.flow(node, node.inputs[0], node.name)
    x = run.state.tie_across(x, [i for i in range(len(x.axes)) if i not in axes])
    for axis in sorted(axes, reverse=True):
        x = lb.drop_axis(x, axis, keep_size_one=bool(node.attrs["keepdim"]))
    return x


def moved(run: Run, node: Node, result: Labels | None, does: str) -> Labels:
    """The labels of values that change places. None: what the operator `does` it does across channels."""
    if result is None:
        return run.give_up(node, f"'{node.name}' {does} across channels", node.inputs[:1])
    run.flow(node, node.inputs[0], node.name)
    return result


def reshape(run: Run, node: Node) -> Labels:
    return moved(run, node, lb.reshape(run.value(node.inputs[0]), run.shape(node.name)), "reshapes")


def permute(run: Run, node: Node) -> Labels:
    run.flow(node, node.inputs[0], node.name)
    return lb.permute(run.value(node.inputs[0]), node.attrs["axes"])


def expand(run: Run, node: Node) -> Labels:
    return moved(run, node, lb.expand(run.value(node.inputs[0]), run.shape(node.name)), "expands")


def _take(run: Run, node: Node, axis: int, indices: Ids, does: str) -> Labels:
    """Pick positions of an axis. A single position of the moving axis is frozen: nothing is left to move along."""
    x = run.value(node.inputs[0])
    if len(indices) == 1 and x.moving_axis == axis:
        if x.axes[axis] != (x.sizes[x.moving or 0],):
            return moved(run, node, None, does)
        run.state.freeze(x.ids.take(indices, axis=x.moving), f"'{node.name}' picks one channel")
        return run.unlabelled(node)
    return moved(run, node, lb.take(x, axis, indices, zero_fill=True), does)


def slice_(run: Run, node: Node) -> Labels:
    a = node.attrs
    places = np.arange(run.shape(node.inputs[0])[a["axis"]])
    return _take(run, node, a["axis"], places[a["start"] : a["stop"] : a["step"]], "slices")


def select(run: Run, node: Node) -> Labels:
    axis = node.attrs["axis"]
    result = _take(run, node, axis, np.array([node.attrs["index"]]), "picks")
    return lb.drop_axis(result, axis) if result.moving is not None else result


def gather(run: Run, node: Node) -> Labels:
    return _take(run, node, node.attrs["axis"], np.asarray(node.attrs["indices"], np.int64), "gathers")


def roll(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    result: Labels | None = x
    for shift, axis in zip(node.attrs["shifts"], node.attrs["axes"], strict=True):
        if result is not None and x.shape[axis] > 1:
            result = lb.take(result, axis, np.roll(np.arange(x.shape[axis]), shift))
    return moved(run, node, result, "rolls")


def pad(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    result: Labels | None = x
    for axis, (before, after) in enumerate(node.attrs["pads"]):
        if result is not None and (before or after):
            indices = np.concatenate([np.full(before, -1), np.arange(x.shape[axis]), np.full(after, -1)])
            result = lb.take(result, axis, indices, zero_fill=node.attrs.get("value", 0.0) == 0.0)
    return moved(run, node, result, "pads")


def concat(run: Run, node: Node) -> Labels:
    """Along the axis that moves: one row after the other. Along another axis: all parts must be permuted alike."""
    axis = int(node.attrs["axis"])
    known = [run.value(v) for v in node.inputs if not run.is_constant(v)]
    lead = next((p for p in known if p.moving is not None), None)
    parts = [run.value(v, lead.moving_axis if lead is not None else None) for v in node.inputs]
    lead = lead or next((p for p in parts if p.moving is not None), None)
    if lead is None:
        return run.unlabelled(node)
    reason = f"'{node.name}' concatenates it with channels that keep their order"
    for i, part in enumerate(parts):
        if part.moving is not None and part.moving_axis != lead.moving_axis:
            run.state.freeze(part.ids, reason)
            parts[i] = lb.unlabelled(part.shape)
    shape = run.shape(node.name)
    keep = keeps_zero(node.attrs.get("activation"))
    if lead.moving_axis == axis:
        aligned = lb.align(parts, skip=axis)
        joined = lb.concat(aligned, axis) if aligned is not None else None
        if joined is None:
            return run.give_up(node, f"'{node.name}' concatenates channels arranged differently")
        run.flow(node, *node.inputs, node.name)
        return run.no_zeros(joined, keep)
    tied: list[Labels] = []
    for part in parts:
        flat = (
            run.state.tie_across(part, [i for i in range(len(shape)) if i != axis]) if part.moving is not None else part
        )
        tied.append(lb.resize_axis(flat, axis, shape[axis]) or lb.unlabelled(shape))
    matched = lb.align(tied)
    if matched is None or len({p.moving for p in matched if p.moving is not None}) > 1:
        for part in parts:
            run.state.freeze(part.ids, reason)
        return run.unlabelled(node)
    ids = next(p.ids for p in matched if p.moving is not None)
    result = next(p for p in matched if p.moving is not None)
    for part in matched:
        run.state.tie(ids, part.ids, reason)
        a, b = np.broadcast_arrays(ids, part.ids)
        ids = np.where(a == ZERO, b, a)
    run.flow(node, *node.inputs, node.name)
    return run.no_zeros(Labels(result.axes, ids, result.moving), keep)


RULES: dict[str, Rule] = {
    "conv": conv,
    "linear": linear,
    "matmul": matmul,
    "batch_norm": batch_norm,
    "add": add,
    "mul": mul,
    "concat": concat,
    "max_pool": pool,
    "avg_pool": pool,
    "mean": mean,
    "reshape": reshape,
    "permute": permute,
    "expand": expand,
    "slice": slice_,
    "select": select,
    "pad": pad,
    "roll": roll,
    "gather": gather,
    "layer_norm": layer_norm,
    "softmax": softmax,
    **ATEN_RULES,
}
