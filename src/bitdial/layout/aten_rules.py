"""Operators outside the core set that treat every channel alike, so that permuted channels pass through them.

All others read their operands in the original order.
"""

from __future__ import annotations

import re

from bitdial.graph.ir import Node
from bitdial.layout import labels as lb
from bitdial.layout.labels import Labels
from bitdial.layout.propagate import Rule, Run, elementwise, operand_slots, unknown

_POINTWISE = (
    "abs.default acos.default asin.default atan.default ceil.default celu.default clamp.default clamp_max.default "
    "clamp_min.default clone.default cos.default cosh.default div.Tensor div.Scalar elu.default erf.default "
    "exp.default exp2.default expm1.default floor.default gelu.default hardshrink.default hardsigmoid.default "
    "hardswish.default hardtanh.default leaky_relu.default log.default log10.default log1p.default log2.default "
    "log_sigmoid.default maximum.default minimum.default mish.default neg.default pow.Tensor_Scalar "
    "pow.Tensor_Tensor reciprocal.default relu.default relu6.default round.default rsqrt.default rsub.Scalar "
    "rsub.Tensor selu.default sigmoid.default sign.default silu.default sin.default softplus.default "
    "softshrink.default sqrt.default square.default sub.Scalar sub.Tensor tan.default tanh.default "
    "threshold.default trunc.default add.Tensor add.Scalar mul.Tensor mul.Scalar to.dtype _to_copy.default "
)

# each works on the last d axes of every channel, d being the digit in its name, and maps zeros to zeros
_SPATIAL = (
    "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default "
    "adaptive_max_pool1d.default adaptive_max_pool2d.default avg_pool1d.default avg_pool2d.default "
    "avg_pool3d.default max_pool1d.default max_pool2d.default max_pool3d.default reflection_pad1d.default "
    "reflection_pad2d.default reflection_pad3d.default replication_pad1d.default replication_pad2d.default "
    "replication_pad3d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec "
    "upsample_linear1d.vec upsample_bilinear2d.default upsample_bilinear2d.vec upsample_bicubic2d.default "
    "upsample_bicubic2d.vec _upsample_bilinear2d_aa.default "
)


def pointwise(run: Run, node: Node) -> Labels:
    """Value by value, with broadcasting between several operands."""
    result = elementwise(run, node, operand_slots(node))
    return run.no_zeros(result, keep=False)


def spatial(run: Run, node: Node) -> Labels:
    """Mixes the last axes of each channel only."""
    x = run.value(node.inputs[0])
    shape = run.shape(node.name)
    match = re.search(r"([123])d", node.op)
    assert match is not None
    rank = len(x.axes)
    window = range(rank - int(match[1]), rank)
    if x.moving is None:
        return x
    if (
        len(node.inputs) != 1
        or len(shape) != rank
        or x.moving_axis in window
        or shape[: window.start] != x.shape[: window.start]
    ):
        return unknown(run, node)
    run.flow(node, node.inputs[0], node.name)
    x = run.state.tie_across(x, range(window.start))
    for axis in window:
        resized = lb.resize_axis(x, axis, shape[axis])
        assert resized is not None  # the labels do not vary there any more
        x = resized
    return x


def embedding(run: Run, node: Node) -> Labels:
    """Rows of a table: its columns are the producer's channels, and a constant table is permuted like any weight."""
    table = node.inputs[0]
    if len(node.inputs) != 2 or not run.is_constant(table):
        return unknown(run, node)
    labels = run.value(table, 1)
    if labels.moving is None:
        return run.unlabelled(node)
    run.flow(node, table, node.name)
    shape = run.shape(node.name)
    return lb.along(shape, len(shape) - 1, labels.rows()[0])


ATEN_RULES: dict[str, Rule] = {
    "aten.embedding.default": embedding,
    **{f"aten.{name}": pointwise for name in _POINTWISE.split()},
    **{f"aten.{name}": spatial for name in _SPATIAL.split()},
}
