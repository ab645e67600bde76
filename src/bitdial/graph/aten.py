"""The fixed list of torch operators that may stand in a graph as `aten.*` nodes and run in float.

A graph read from a file can name only these: all are pure functions of their arguments (no randomness, no in-place
writes, no file or network access) whose results are real numbers of a size that follows from the arguments' sizes. An
operator that is missing here makes capture fail with its name and module path. Adding one is one word in this file, and one more
in each of its sets that the operator belongs to: what it does to dtypes, and to channels.
"""

from __future__ import annotations

_DEFAULT = """
abs acos acosh argsort asin asinh atan atanh avg_pool1d avg_pool3d
bitwise_not bmm ceil celu channel_shuffle col2im conv_tbc cos cosh cumprod
digamma einsum elu embedding erf erfc erfinv exp exp2 expm1 floor floor_divide frac gelu glu grid_sampler grid_sampler_2d
group_norm hardshrink hardsigmoid hardswish hardtanh im2col instance_norm isfinite isinf isnan layer_norm leaky_relu
linalg_vector_norm log log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor logit
matmul maximum minimum mish mm mv native_channel_shuffle neg one_hot pixel_shuffle pixel_unshuffle prelu reciprocal
reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 replication_pad1d replication_pad2d replication_pad3d
repeat rms_norm round rsqrt selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt square tan tanh
threshold trace trunc unfold zeros_like ones_like adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d avg_pool2d max_pool1d max_pool2d max_pool3d constant_pad_nd
flip fliplr flipud gather index_select permute roll take_along_dim tril triu pad
full_like addmm baddbmm addcmul addcdiv cosine_similarity pairwise_distance native_group_norm
native_layer_norm topk convolution conv_transpose1d scaled_dot_product_attention clone
""".split()

_OVERLOADS = """
add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode
rsub.Tensor rsub.Scalar fmod.Tensor fmod.Scalar lerp.Tensor lerp.Scalar
pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar remainder.Scalar remainder.Tensor floor_divide.Scalar
eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar ge.Tensor
amax.default amin.default max.dim min.dim sum.dim_IntList sum.default mean.dim mean.default prod.dim_int var.correction
std.correction argmax.default argmin.default all.dim any.dim cumsum.default logsumexp.default
softmax.int _softmax.default _safe_softmax.default log_softmax.int _log_softmax.default
where.self where.ScalarOther where.ScalarSelf masked_fill.Scalar masked_fill.Tensor index.Tensor
to.dtype _to_copy.default clamp.default clamp_min.default clamp_max.default clamp.Tensor atan2.default
upsample_nearest2d.default upsample_nearest2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
upsample_bicubic2d.default upsample_bicubic2d.vec upsample_nearest1d.vec upsample_linear1d.vec
_upsample_bilinear2d_aa.default
conv_transpose2d.input conv_transpose3d.input repeat_interleave.self_int flatten.using_ints squeeze.dim squeeze.dims
unsqueeze.default expand.default view.default reshape.default _unsafe_view.default transpose.int select.int slice.Tensor
stack.default cat.default norm.ScalarOpt_dim scatter.src unfold.default bitwise_and.Tensor bitwise_or.Tensor
scalar_tensor.default movedim.int
""".split()

ALLOWED = frozenset({f"aten.{name}.default" for name in _DEFAULT} | {f"aten.{name}" for name in _OVERLOADS})


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


# ---- what operators do to dtypes, by name without overload; all others keep that of their first tensor

TRUE = frozenset(
    "acos acosh asin asinh atan atan2 atanh cos cosh cosine_similarity digamma erf erfc erfinv exp exp2 expm1 log log10 log1p "
    "log2 logit logsumexp pairwise_distance reciprocal rsqrt sigmoid sin sinc sinh sqrt tan tanh".split()
)  # integers become float32
PROMOTED = frozenset(
    "add addcdiv addcmul bitwise_and bitwise_or cat clamp clamp_max clamp_min div floor_divide fmod lerp maximum minimum mul "
    "pow remainder rsub stack sub where".split()
)
BOOLEAN = frozenset(
    "all any eq ge gt isfinite isinf isnan le logical_and logical_not logical_or logical_xor lt ne".split()
)
INDICES = frozenset({"argmax", "argmin", "argsort", "one_hot"})
SUMS = frozenset({"cumprod", "cumsum", "prod", "sum", "trace"})  # of integers: int64
SECOND_INDICES = frozenset({"adaptive_max_pool1d", "adaptive_max_pool2d", "max", "min", "topk"})

# ---- what operators do to channels; all others read them in their original order

# value by value, with broadcasting between several operands
POINTWISE = _names(
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
SPATIAL = _names(
    "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default "
    "adaptive_max_pool1d.default adaptive_max_pool2d.default avg_pool1d.default avg_pool2d.default "
    "avg_pool3d.default max_pool1d.default max_pool2d.default max_pool3d.default reflection_pad1d.default "
    "reflection_pad2d.default reflection_pad3d.default replication_pad1d.default replication_pad2d.default "
    "replication_pad3d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec "
    "upsample_linear1d.vec upsample_bilinear2d.default upsample_bilinear2d.vec upsample_bicubic2d.default "
    "upsample_bicubic2d.vec _upsample_bilinear2d_aa.default "
)
