"""A model at one fixed ratio as an ONNX graph: quantize/dequantize pairs, 4-bit and 8-bit weights.

Values stay in 8-bit steps between the nodes: every `DequantizeLinear` of an 8-bit value has scale 1 (or the float32 factor
that the reference engine multiplies with), so that the float32 products of a runtime are sums of small integers, which
are exact, and each rounding is the one that the reference engine makes. See `bitdial.export.onnx.compute`.
"""

from bitdial.export.onnx.check import Comparison, compare, random_batches
from bitdial.export.onnx.export import DEFAULT_OPSET, SMALLEST_OPSET, OnnxModel, export_onnx, to_onnx

__all__ = [
    "DEFAULT_OPSET",
    "SMALLEST_OPSET",
    "Comparison",
    "OnnxModel",
    "compare",
    "export_onnx",
    "random_batches",
    "to_onnx",
]
