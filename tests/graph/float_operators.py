"""One call of every operator of `bitdial.graph.aten.ALLOWED`, on operands of any dtype: what the sweep runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdial.graph.aten import ALLOWED


class Operands:
    """x [N, 4, 6, 6] and y alike, of the swept dtype, and the parts of them that operators need."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.dtype = x, y, x.dtype
        self.n = x.shape[0]
        self.plane, self.row = x[:, 0], x[:, 0, 0]  # [N, 6, 6], [N, 6]
        self.volume = x[:, :, None].expand(-1, -1, 6, -1, -1)  # [N, 4, 6, 6, 6]

    def constant(self, *shape: int) -> Tensor:
        return torch.full(shape, 2).to(self.dtype)

    @property
    def index(self) -> Tensor:
        return (self.x != 0).long()

    @property
    def scalar(self) -> Tensor:
        return torch.tensor(2).to(self.dtype)


Call = Callable[[Any, Operands], Any]
_POSITION = "argmax argmin"
_PAIRS = (
    "atan2 logical_and logical_or logical_xor maximum minimum add.Tensor sub.Tensor mul.Tensor div.Tensor rsub.Tensor "
    "fmod.Tensor remainder.Tensor pow.Tensor_Tensor eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor "
    "bitwise_and.Tensor bitwise_or.Tensor floor_divide cosine_similarity pairwise_distance"
)
_SCALARS = (
    "add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar fmod.Scalar remainder.Scalar pow.Tensor_Scalar eq.Scalar ne.Scalar "
    "lt.Scalar le.Scalar gt.Scalar ge.Scalar floor_divide.Scalar clamp_min clamp_max"
)
_AXIS = (
    "amax amin max.dim min.dim sum.dim_IntList mean.dim prod.dim_int logsumexp cumsum cumprod all.dim any.dim argsort "
    "softmax.int log_softmax.int _safe_softmax squeeze.dim unsqueeze flip glu"
)


def _calls() -> dict[str, list[Call]]:
    size = [12, 12]
    result: dict[str, list[Call]] = {}
    for name in _PAIRS.split():
        result[name] = [lambda f, v: f(v.x, v.y), lambda f, v: f(v.x, v.x != 0), lambda f, v: f(v.x, v.scalar)]
    for name in _SCALARS.split():
        result[name] = [lambda f, v: f(v.x, 2), lambda f, v: f(v.x, 0.5)]
    for name in _AXIS.split():
        listed = name.split(".")[0] in ("amax", "amin", "sum", "mean", "logsumexp", "flip")
        result[name] = [(lambda f, v: f(v.x, [2])) if listed else (lambda f, v: f(v.x, 2))]
    for name in ("sum.dim_IntList", "mean.dim"):
        result[name].append(lambda f, v: f(v.x, [1, 2], True, dtype=torch.float32))
    for name in ("cumsum", "cumprod", "prod.dim_int"):
        result[name].append(lambda f, v: f(v.x, 1, dtype=torch.float64))
    for name in ("softmax.int", "log_softmax.int"):
        result[name].append(lambda f, v: f(v.x, 1, torch.float32))
    for name in _POSITION.split():
        result[name] = [lambda f, v: f(v.x, 1), lambda f, v: f(v.x, -1, True)]
    for name in ("_softmax", "_log_softmax"):
        result[name] = [lambda f, v: f(v.x, 1, False)]
    for name in ("zeros_like", "ones_like"):
        result[name] = [lambda f, v: f(v.x), lambda f, v: f(v.x, dtype=torch.int32)]
    for name in ("reflection_pad", "replication_pad"):
        result[name + "1d"] = [lambda f, v: f(v.plane, [1, 2])]
        result[name + "2d"] = [lambda f, v: f(v.x, [1, 2, 0, 1])]
        result[name + "3d"] = [lambda f, v: f(v.volume, [1, 2, 0, 1, 1, 1])]
    for name in ("avg_pool", "max_pool"):
        for rank in (1, 2, 3):
            result[f"{name}{rank}d"] = [
                lambda f, v, r=rank: f((v.plane, v.x, v.volume)[r - 1], [3] * r, [2] * r, [1] * r)
            ]
    for name in ("adaptive_avg_pool", "adaptive_max_pool"):
        for rank in (1, 2, 3) if "avg" in name else (1, 2):
            result[f"{name}{rank}d"] = [lambda f, v, r=rank: f((v.plane, v.x, v.volume)[r - 1], [4] * r)]
    for name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"):
        result[name] = [lambda f, v: f(v.x, size, False)]
    for name in ("upsample_bilinear2d.vec", "upsample_bicubic2d.vec"):
        result[name] = [lambda f, v: f(v.x, size, True, None)]
    result["upsample_nearest2d"] = [lambda f, v: f(v.x, size)]
    result["upsample_nearest2d.vec"] = [lambda f, v: f(v.x, size, None)]
    result["upsample_nearest1d.vec"] = [lambda f, v: f(v.plane, [12], None)]
    result["upsample_linear1d.vec"] = [lambda f, v: f(v.plane, [12], False, None)]
    for name in ("view", "reshape", "_unsafe_view"):
        result[name] = [lambda f, v: f(v.x, [v.n, 24, 6])]
    for name in ("tril", "triu"):
        result[name] = [lambda f, v: f(v.x, 1)]
    for name in ("grid_sampler", "grid_sampler_2d"):
        result[name] = [lambda f, v: f(v.x, v.x[:, 0, :, :2, None].expand(-1, -1, -1, 2), 0, 0, False)]
    for name in ("hardshrink", "softshrink", "channel_shuffle", "native_channel_shuffle"):
        result[name] = [lambda f, v, a=1 if "shrink" in name else 2: f(v.x, a)]
    for name in ("bmm", "matmul"):
        result[name] = [lambda f, v: f(v.plane, v.y[:, 1])]
    for name in ("var.correction", "std.correction"):
        result[name] = [lambda f, v: f(v.x, [1, 2], correction=1)]
    result |= {
        "_to_copy": [lambda f, v, d=d: f(v.x, dtype=d) for d in (torch.float32, torch.int64, torch.float16, torch.bool)],
        "to.dtype": [lambda f, v: f(v.x, torch.uint8), lambda f, v: f(v.x, torch.float64)],
        "addcdiv": [lambda f, v: f(v.x, v.y, v.y, value=2)],
        "addcmul": [lambda f, v: f(v.x, v.y, v.y, value=2)],
        "addmm": [lambda f, v: f(v.row, v.row, v.constant(6, 6)), lambda f, v: f(v.constant(3), v.row, v.constant(6, 3))],
        "baddbmm": [lambda f, v: f(v.plane, v.plane, v.plane)],
        "cat": [lambda f, v: f([v.x, v.y], 1), lambda f, v: f([v.x, v.y != 0, v.constant(1, 1, 6, 6).expand_as(v.x)], 1)],
        "stack": [lambda f, v: f([v.x, v.y], 1), lambda f, v: f([v.x, v.y], -1)],
        "celu": [lambda f, v: f(v.x, 0.5)],
        "clamp": [lambda f, v: f(v.x, 1, 2), lambda f, v: f(v.x, None, 1.5), lambda f, v: f(v.x, 0)],
        "clamp.Tensor": [lambda f, v: f(v.x, v.scalar, v.y)],
        "clone": [lambda f, v: f(v.x)],
        "col2im": [lambda f, v: f(v.x.reshape(v.n, 4, 36), [7, 7], [2, 2], [1, 1], [0, 0], [1, 1])],
        "im2col": [lambda f, v: f(v.x, [2, 2], [1, 1], [0, 0], [1, 1])],
        "constant_pad_nd": [lambda f, v: f(v.x, [1, 2], 1), lambda f, v: f(v.x, [0, 0, -1, 2], 0.0)],
        "pad": [lambda f, v: f(v.x, [1, 2], "constant", 1.0), lambda f, v: f(v.x, [1, 2, 1, 2], "reflect")],
        "conv_tbc": [lambda f, v: f(v.plane.transpose(0, 1).contiguous(), v.constant(3, 6, 5), v.constant(5), 1)],
        "conv_transpose1d": [lambda f, v: f(v.plane, v.constant(6, 2, 3))],
        "conv_transpose2d.input": [lambda f, v: f(v.x, v.constant(4, 2, 3, 3))],
        "conv_transpose3d.input": [lambda f, v: f(v.volume, v.constant(4, 2, 3, 3, 3))],
        "convolution": [
            lambda f, v: f(v.x, v.constant(4, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        ],  # transposed; others are core operators
        "div.Scalar_mode": [lambda f, v, m=m: f(v.x, 2, rounding_mode=m) for m in (None, "floor", "trunc")],
        "div.Tensor_mode": [lambda f, v, m=m: f(v.x, v.y, rounding_mode=m) for m in (None, "floor", "trunc")],
        "einsum": [lambda f, v: f("nij,njk->nik", [v.plane, v.plane])],
        "elu": [lambda f, v: f(v.x), lambda f, v: f(v.x, 0.5, 2.0)],
        "embedding": [lambda f, v: f(v.constant(7, 3), v.index)],
        "expand": [lambda f, v: f(v.x[:, :1], [v.n, 5, 6, 6])],
        "flatten.using_ints": [lambda f, v: f(v.x, 1, 2)],
        "fliplr": [lambda f, v: f(v.x)],
        "flipud": [lambda f, v: f(v.x.transpose(0, 1))],
        "full_like": [lambda f, v: f(v.x, 3), lambda f, v: f(v.x, 0.5, dtype=torch.float32)],
        "gather": [lambda f, v: f(v.x, 1, v.index)],
        "gelu": [lambda f, v: f(v.x), lambda f, v: f(v.x, approximate="tanh")],
        "group_norm": [lambda f, v: f(v.x, 2, v.constant(4), v.constant(4)), lambda f, v: f(v.x, 2)],
        "native_group_norm": [lambda f, v: f(v.x, None, None, v.n, 4, 36, 2, 1e-5)],
        "instance_norm": [lambda f, v: f(v.x, None, None, None, None, True, 0.0, 1e-5, False)],
        "layer_norm": [lambda f, v: f(v.x, [6]), lambda f, v: f(v.x, [6], v.constant(6), v.constant(6))],
        "native_layer_norm": [lambda f, v: f(v.x, [6], None, None, 1e-5)],
        "rms_norm": [lambda f, v: f(v.x, [6]), lambda f, v: f(v.x, [6], v.constant(6))],
        "hardtanh": [lambda f, v: f(v.x, 0, 1)],
        "index.Tensor": [lambda f, v: f(v.x, [None, torch.tensor([1, 0])])],
        "index_select": [lambda f, v: f(v.x, 1, torch.tensor([1, 0]))],
        "leaky_relu": [lambda f, v: f(v.x, 0.5)],
        "lerp.Scalar": [lambda f, v: f(v.x, v.y, 0.5)],
        "lerp.Tensor": [lambda f, v: f(v.x, v.y, v.y)],
        "linalg_vector_norm": [lambda f, v: f(v.x, 2, [1]), lambda f, v: f(v.x, 1.0, [1], True, dtype=torch.float64)],
        "norm.ScalarOpt_dim": [lambda f, v: f(v.x, 2, [1])],
        "logit": [lambda f, v: f(v.x, 0.2)],
        "masked_fill.Scalar": [lambda f, v: f(v.x, v.y != 0, 3)],
        "masked_fill.Tensor": [lambda f, v: f(v.x, v.y != 0, v.scalar)],
        "mm": [lambda f, v: f(v.row, v.constant(6, 3))],
        "mv": [lambda f, v: f(v.row, v.constant(6))],
        "movedim.int": [lambda f, v: f(v.x, 1, 3)],
        "one_hot": [lambda f, v: f(v.index, 5)],
        "permute": [lambda f, v: f(v.x, [0, 2, 3, 1])],
        "pixel_shuffle": [lambda f, v: f(v.x, 2)],
        "pixel_unshuffle": [lambda f, v: f(v.x, 2)],
        "pow.Scalar": [lambda f, v: f(2, v.x), lambda f, v: f(0.5, v.x)],
        "prelu": [lambda f, v: f(v.x, v.constant(4))],
        "repeat": [lambda f, v: f(v.x, [1, 1, 2, 1])],
        "repeat_interleave.self_int": [lambda f, v: f(v.x, 2, 1)],
        "roll": [lambda f, v: f(v.x, [1], [2])],
        "scalar_tensor": [lambda f, v: v.x + f(3), lambda f, v: v.x + f(v.n, dtype=torch.int64)],
        "scaled_dot_product_attention": [
            lambda f, v: f(v.x, v.y, v.x),
            lambda f, v: f(v.x, v.y, v.x, v.x != 1),
            lambda f, v: f(v.x, v.y, v.x, torch.arange(6)[:, None] > torch.arange(6)),
        ],
        "scatter.src": [lambda f, v: f(v.x, 1, v.index, v.y)],
        "select.int": [lambda f, v: f(v.x, 1, 2)],
        "slice.Tensor": [lambda f, v: f(v.x, 2, 1, 5, 2)],
        "softplus": [lambda f, v: f(v.x), lambda f, v: f(v.x, 2.0)],
        "squeeze.dims": [lambda f, v: f(v.x[:, :1, :1], [1, 2])],
        "sum": [lambda f, v: f(v.x), lambda f, v: f(v.x, dtype=torch.float64)],
        "take_along_dim": [lambda f, v: f(v.x, v.index, 1)],
        "threshold": [lambda f, v: f(v.x, 1, 2)],
        "topk": [lambda f, v: f(v.x, 2, -1)],
        "trace": [lambda f, v: f(v.row)],
        "transpose.int": [lambda f, v: f(v.x, 1, 2)],
        "unfold": [lambda f, v: f(v.x, 2, 3, 2)],
        "where.ScalarOther": [lambda f, v: f(v.y != 0, v.x, 2), lambda f, v: f(v.y != 0, v.x, 0.5)],
        "where.ScalarSelf": [lambda f, v: f(v.y != 0, 2, v.x)],
        "where.self": [lambda f, v: f(v.y != 0, v.x, v.y), lambda f, v: f(v.y != 0, v.x, v.scalar)],
    }
    return result


def calls() -> dict[str, list[Call]]:
    """Name in ALLOWED -> calls (function, operands) -> result. Operators without an entry of their own take x alone."""
    table = _calls()
    known = {f"aten.{name}" if "." in name else f"aten.{name}.default": entry for name, entry in table.items()}
    assert set(known) <= ALLOWED, sorted(set(known) - ALLOWED)
    return {name: known.get(name, [lambda f, v: f(v.x)]) for name in sorted(ALLOWED)}


def function(name: str) -> Any:
    """The operator of torch by its name in a graph."""
    _, base, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, base), overload)
