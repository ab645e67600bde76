"""Softmax and its exponential in a fixed order of float32 operations (see `ordered`), equal to the bit in every engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitdial.engines.reference.ordered import ordered_sum

FLUSH = -72.0  # below, the exponential counts as 0: no product with a row's factor is then a denormal number
LOG2_E = 1.4426950216293335
LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444e-4  # n * LN2_HIGH is exact for |n| < 2^15
POLYNOMIAL = (1.0, 0.9999997019767761, 0.4999914765357971, 0.1666763871908188, 0.04189816117286682, 0.008290272206068039)
BLOCK = 1 << 16  # elements worked on at once, so that the passes over them stay in the cache


def exp32(x: Tensor) -> Tensor:
    """exp of float32 x <= 0, in place. Within 2.5 units in the last place; 0 below FLUSH; exactly 1 at 0.

    n = rne(fl(x * LOG2_E)); r = fl(fl(x - n * LN2_HIGH) - fl(n * LN2_LOW)); the polynomial in r by Horner's rule, every product
    and sum rounded; times 2^n.
    """
    kept = x >= FLUSH
    x.clamp_(min=FLUSH)
    n = (x * LOG2_E).round_()
    r = x.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)
    y = torch.full_like(r, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        y.mul_(r).add_(coefficient)
    bits = y.view(torch.int32).add_(n.to(torch.int32).mul_(1 << 23))  # no product: nothing here is denormal or overflows
    return bits.mul_(kept).view(torch.float32)


def softmax(x: Tensor, dim: int) -> Tensor:
    """m = max; e = exp32(fl(x - m)); p = fl(e * fl(1 / sum(e))), the sum in the order of `ordered_sum`.

    A row of -inf throughout gives 0. What a row with NaN or +inf gives is not defined.
    """
    rows = x.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1]) if rows.numel() else rows.reshape(0, 1)
    result = torch.empty_like(flat)
    step = max(1, BLOCK // flat.shape[1]) if x.device.type == "cpu" else max(1, flat.shape[0])
    for part, to in zip(torch.split(flat, step), torch.split(result, step), strict=True):
        top = part.amax(dim=-1, keepdim=True)
        e = exp32(part - top.masked_fill_(top == -math.inf, 0.0))
        total = ordered_sum(e)
        inverse = torch.div(torch.ones_like(total), total).masked_fill_(total == 0.0, 0.0)
        torch.mul(e, inverse, out=to)
    return result.reshape(rows.shape).movedim(-1, dim)
