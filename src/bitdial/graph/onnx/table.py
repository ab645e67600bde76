"""Every ONNX operator that is read, and its converter: `Call` -> the value of its output, or a list for several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitdial.graph.onnx import layers, movement, pointwise
from bitdial.graph.onnx.call import Call

CONVERTERS: dict[str, Callable[[Call], Any]] = {**layers.CONVERTERS, **pointwise.CONVERTERS, **movement.CONVERTERS}
