"""Sampled patches are rows of the im2col matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.engines.reference.patches import IMAGES_PER_BATCH, patch_rows
from bitdial.graph.ir import Node

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(
    kernel=PAIR,
    stride=PAIR,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=PAIR,
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    images=st.integers(1, 20),
    count=st.integers(1, 400),
    channels_last=st.booleans(),
)
def test_patches_of_convolutions_are_rows_of_unfold(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    size: tuple[int, int], images: int, count: int, channels_last: bool,
) -> None:  # fmt: skip
    x = torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(images))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    attrs = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": 1}
    node = Node("c", "conv", ["x"], attrs, "w")
    found = patch_rows(node, (4, 3, *kernel), x, torch.Generator().manual_seed(7), count)
    generator = torch.Generator().manual_seed(7)
    chosen = x[torch.randperm(images, generator=generator)[:IMAGES_PER_BATCH]]
    matrix = F.unfold(chosen, kernel, dilation, padding, stride).transpose(1, 2).reshape(-1, 3, kernel[0] * kernel[1])
    assert torch.equal(found, matrix[torch.randperm(len(matrix), generator=generator)[:count].sort().values])
