"""Sums and products of 8-bit values in torch, by its fast operators where it has them."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_FLOAT32 = 1 << 24
EXACT_ROWS = EXACT_FLOAT32 // 256  # 8-bit values whose sum float32 holds exactly
EXACT_BYTES = (1 << 15) // 256  # as many in int16


@lru_cache(maxsize=1)
def int8_products() -> bool:
    """Whether torch multiplies 8-bit matrices fast here (it does where the processor has VNNI) and is exact on a probe."""
    fast = getattr(torch.cpu, "_is_vnni_supported", None)
    if fast is None or not hasattr(torch, "_int_mm") or not fast():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (33, 1000), generator=generator).float()
    weight = torch.randint(-127, 128, (17, 1000), generator=generator).float()
    x[0], weight[0], weight[1] = 255.0, 127.0, -127.0
    exact = F.linear(x.double(), weight.double())
    centred = F.linear((x - 128.0).double(), weight.double())
    try:
        found = int8_product(x, weight), int8_product(x - 128.0, weight)
    except RuntimeError:
        return False
    return torch.equal(found[0].double(), exact) and torch.equal(found[1].double(), centred)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """int32 [n, o] of int8 matrices [n, m] and [m, o]. torch 2.13 errs where the second has one row or one column."""
    if 1 in b.shape:
        return (a.double() @ b.double()).to(torch.int32)
    return torch._int_mm(a, b)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """int32 accumulators of a linear layer on the CPU, exact where they fit. x [.., C]: integers in 0..255 or -128..127, as
    float32 or in bytes."""
    flat = x.reshape(-1, x.shape[-1])
    unsigned = flat.dtype == torch.uint8 or (flat.dtype != torch.int8 and bool(flat.min() >= 0))
    offset = 128.0 if unsigned else 0.0  # torch has signed operands only
    if flat.dtype == torch.uint8:
        operand = (flat ^ 128).view(torch.int8)
    else:
        operand = (flat - offset if offset else flat).to(torch.int8)
    acc = _product(operand, weight.to(torch.int8).t())
    if offset:
        acc += (weight.double().sum(dim=1) * offset).to(torch.int32)
    return acc.reshape(*x.shape[:-1], -1)


def sample_sum(x: Tensor) -> Tensor:
    """float64: the sum over the first axis, exact for 8-bit values, as float32 or in bytes. It runs along memory, and in float32
    or int16 as far as that is exact: each is a multiple of the speed."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return sample_sum(x.permute(0, 2, 3, 1)).permute(2, 0, 1)
    total = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    rows, kind = (EXACT_ROWS, x.dtype) if x.is_floating_point() else (EXACT_BYTES, torch.int16)
    whole = len(x) // rows
    if whole > 1:
        total += x[: whole * rows].reshape(whole, rows, *x.shape[1:]).sum(dim=1, dtype=kind).sum(dim=0, dtype=torch.float64)
        x = x[whole * rows :]
    for part in torch.split(x, rows):
        total += part.sum(dim=0, dtype=kind)
    return total


def squared_sums(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """float64 [m, m]: products of the columns of x [n, m] with each other, less their means where given (float64 [m]).

    x: integers in bytes, at most 2^16 rows. Only where `int8_products` says so.
    """
    own, offset = ((x ^ 128).view(torch.int8), 128.0) if x.dtype == torch.uint8 else (x, 0.0)
    lack = (torch.zeros(x.shape[1], dtype=torch.float64) if mean is None else mean) - offset  # what `own` has too much
    total = sample_sum(own)
    products = _product(own.t(), own).double().addr_(lack, lack, alpha=len(x))
    products.addr_(total, lack, alpha=-1).addr_(lack, total, alpha=-1)
    products.diagonal().clamp_(min=0.0)  # of a constant column
    return products
