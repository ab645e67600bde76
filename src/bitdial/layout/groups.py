"""Borders of the groups of feature channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError


def group_bounds(n_channels: int, group_size: int, conv_groups: int = 1) -> npt.NDArray[np.int32]:
    """Borders of consecutive groups of `group_size` feature channels; int32 [n_groups + 1], from 0 to n_channels.

    No group crosses a border between convolution groups; the last group of each may be short.
    Raises ConfigError for sizes below 1 or channels that do not divide into the convolution groups.
    """
    if group_size < 1:
        raise ConfigError(f"group size {group_size} is below 1: use 8, 16, 32 or 64")
    if n_channels < 1 or conv_groups < 1 or n_channels % conv_groups:
        raise ConfigError(
            f"{n_channels} channels cannot be divided into {conv_groups} convolution groups of equal size"
        )
    width = n_channels // conv_groups
    starts = np.arange(0, width, group_size)
    inside = (np.arange(conv_groups)[:, None] * width + starts[None, :]).reshape(-1)
    return np.append(inside, n_channels).astype(np.int32)
