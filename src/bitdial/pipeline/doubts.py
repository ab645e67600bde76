"""What a caller should know about calibration data that can be used, but hardly are what was meant."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from torch import Tensor

_REMEDY = "pass samples like those that the network gets in use, prepared in the same way"


def warn_user(text: str) -> None:
    """A UserWarning at the line outside bitdial that called it. (The command line prints them as notes.)"""
    level, frame = 1, sys._getframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "bitdial":
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(text, UserWarning, stacklevel=level)


def doubtful_inputs(names: Sequence[str], inputs: Sequence[Tensor]) -> list[str]:
    """Warnings about calibration inputs without content, given to the user and returned.

    names, inputs: of the graph, in order; batch first. Integer and boolean inputs beside others (masks, kinds of tokens) may be
    constant.
    """
    told = []
    constant = [bool((x == x.reshape(-1)[0]).all()) for x in inputs]
    for name, x, same in zip(names, inputs, constant, strict=True):
        if same and (x.is_floating_point() or all(constant)):
            value = x.reshape(-1)[0].item()
            what = "all zero" if value == 0 else f"constant (all {value:g})"
            told.append(
                f"calibration input '{name}' is {what} in all {len(x)} samples: ranges and scores taken from it fit no real "
                f"data; {_REMEDY}"
            )
    if not any(constant) and len(inputs[0]) > 1 and all(bool((x == x[:1]).all()) for x in inputs):
        which = " and ".join(f"'{name}'" for name in names)
        told.append(
            f"calibration input {which} is {len(inputs[0])} times the same sample: ranges and scores taken from one sample fit "
            f"few others; {_REMEDY}"
        )
    for text in told:
        warn_user(text)
    return told
