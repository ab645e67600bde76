"""Exact integer arithmetic carried in floating point, and the epilogue (design notes, section 1).

8-bit values are held as float32 tensors of integers: a float32 sum of integer products is exact, in any order, as long as
every partial sum stays below 2^24 in magnitude. Where the bound of a layer (from its weights at hand) is larger, linear layers
use torch's 8-bit product with int32 sums if it is fast here; else the activations are split into high and low nibbles, or
float64 is used (exact below 2^53).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.graph.batch_axis import BatchAxis
from bitdial.graph.interpreter import CONV
from bitdial.quantization.byte_products import EXACT_FLOAT32, int8_product, int8_products
from bitdial.quantization.instructions import Window

ALIGNMENT = 64  # bytes; of all memory that torch allocates on the CPU


def product(x: Tensor, weight: Tensor, w: Window | None) -> Tensor:
    """Convolution, or linear product where there is no window, in the operands' own type."""
    if w is None:
        return F.linear(x, weight)
    groups = x.shape[1] // weight.shape[1]
    return CONV[weight.dim() - 2](x, weight, None, w.stride, w.padding, w.dilation, groups)


def float32_is_exact(device: torch.device) -> bool:
    """Whether float32 products of integers below 2^24 are exact. Accelerators may round them (TF32) or choose Winograd;
    so does NNPACK, which torch takes for 3x3 convolutions on processors and settings without oneDNN."""
    onednn = torch.backends.mkldnn
    return device.type == "cpu" and bool(onednn.is_available()) and bool(onednn.enabled)  # type: ignore[no-untyped-call]


def channels_last(x: Tensor) -> Tensor:
    """The memory format that convolutions on the CPU are fastest in; x itself where it is in it or on another device."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x


def in_order(x: Tensor) -> Tensor:
    """x in torch's own order of memory and at its alignment, copied only where it is not so.

    Float operators choose the order of their sums by strides and addresses, and whether a value is computed in a vector or
    alone: the last bit would depend on who made x. Measured: group_norm and convolutions of 1 x 1 pixels go by the strides
    of those axes, products of matrices by the address.
    """
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        return x.clone(memory_format=torch.contiguous_format)
    return x.flatten().view(x.shape)  # axes of one element: strides that say nothing, but are looked at


def accumulate(x: Tensor, weight: Tensor, bound: int, window: Window | None) -> Tensor:
    """Exact accumulators of conv or linear as float32 (bound < 2^24) or float64 integers.

    x: float32 integers, |x| <= 255. weight: float32 integers. bound: largest possible |accumulator|. window: None for linear.
    """
    if not float32_is_exact(x.device):
        return product(x.double(), weight.double(), window)
    if bound < EXACT_FLOAT32:
        return product(x, weight, window)
    if window is None and int8_products():
        return int8_product(x, weight).double()
    if (
        bound < 8 * EXACT_FLOAT32
    ):  # nibbles: |high| <= 15 and low <= 15, so either sum is below bound / 15 plus rounding
        high = torch.floor(x / 16.0)
        low = x - high * 16.0
        return product(high, weight, window).double() * 16.0 + product(low, weight, window).double()
    return product(x.double(), weight.double(), window)


def channel_sums(acc: Tensor, axis: int) -> tuple[Tensor, int]:
    """(float64 [O]: sums of a layer's accumulators per output channel, exact in any order; how many each is of)."""
    axis %= acc.dim()
    others = [i for i in range(acc.dim()) if i != axis]
    return acc.double().sum(dim=others), acc.numel() // acc.shape[axis]


def accumulate_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """Exact accumulators of a product of two activations; bound: largest possible |accumulator|."""
    if bound < EXACT_FLOAT32 and float32_is_exact(a.device):
        return torch.matmul(a, b)
    return torch.matmul(a.double(), b.double())


def scaled(accumulators: Tensor, bias: Tensor | None, multiplier: Tensor) -> Tensor:
    """fl(float(acc + bias) * M): one rounding to float32 of the exact integer, one of the product.

    bias: float64 integers, broadcastable; multiplier: float32, broadcastable.
    """
    if bias is None:
        exact = accumulators
    elif accumulators.dtype == torch.float32:
        exact = accumulators.double() + bias
    else:
        exact = accumulators + bias
    return exact.float() * multiplier


def scaled_small(accumulators: Tensor, bias: Tensor, multiplier: Tensor) -> Tensor:
    """As `scaled`, in place, where |acc| + |bias| < 2^24 so that float32 addition is exact already."""
    return accumulators.add_(bias).mul_(multiplier)


def to_eight_bit(t: Tensor, lo: int, hi: int) -> Tensor:
    """Clamp in float, then round half to even (in place)."""
    return t.clamp_(lo, hi).round_()


def extract(x: Tensor, inverse: Tensor, limit_low: Tensor, limit_high: Tensor, power: Tensor) -> Tensor:
    """Read activations back from low precision where their channel is low, leave the others.

    inverse = 2^-shift, power = 2^shift (1 where the channel stays at 8 bits); limits are the low range or the 8-bit one.
    All multiplications by powers of two are exact in float32.
    """
    return torch.maximum(torch.minimum((x * inverse).round_(), limit_high), limit_low).mul_(power)


def extract_bytes(x: Tensor, power: Tensor, limit_low: Tensor, limit_high: Tensor) -> Tensor:
    """As `extract`, of values in bytes (uint8 or int8) and in bytes: a quarter of the memory to go through.

    Limits are whole low values, so that clamping them first changes nothing; then half to even is to add just less than half,
    and 1 where the quotient is odd. Nothing leaves a byte: the highest low value ends half a step below the range.
    """
    lowest, highest = (limit_low * power).to(x.dtype), (limit_high * power).to(x.dtype)
    shift = torch.frexp(power)[1].sub_(1).to(x.dtype)
    below_half, odd = (power / 2 - 1).clamp_min(0).to(x.dtype), (shift > 0).to(x.dtype)
    x = torch.minimum(x, highest)
    if x.dtype == torch.int8:
        x = torch.maximum(x, lowest, out=x)
    odd = (x >> shift).bitwise_and_(odd)
    return x.add_(odd).add_(below_half).bitwise_right_shift_(shift).bitwise_left_shift_(shift)


def dynamic_shift(
    x: Tensor, axis: int, place: BatchAxis, batch: int, group_of_channel: Tensor, n_groups: int, limit: int
) -> Tensor:
    """Shift per (sample, channel) from the data at hand: an OR over the magnitudes of a group has the bit length of
    their maximum.

    x: channels along `axis`, samples along `place`. Returns float32 shifts that broadcast against x (every axis but these
    two has size 1), so that a sample's shifts depend on its own values only.
    """
    axis %= x.dim()
    split = x.abs().reshape(*x.shape[: place.axis], place.outer, batch, place.inner, *x.shape[place.axis + 1 :])
    channel = axis if axis < place.axis else axis + 2
    per_channel = split.movedim((place.axis + 1, channel), (0, 1)).reshape(batch, x.shape[axis], -1).amax(dim=2)
    index = group_of_channel.expand(batch, -1)
    groups = torch.zeros(batch, n_groups, dtype=x.dtype, device=x.device)
    groups.scatter_reduce_(1, index, per_channel, "amax")
    _, exponent = torch.frexp(groups)
    shift = (exponent - limit.bit_length()).clamp_min(0).to(x.dtype).gather(1, index)
    rows = shift[None, :, None].expand(place.outer, batch, place.inner, -1).reshape(-1, x.shape[axis])
    shape = [1] * x.dim()
    shape[place.axis], shape[axis] = rows.shape
    return (rows if place.axis < axis else rows.T).reshape(shape)
