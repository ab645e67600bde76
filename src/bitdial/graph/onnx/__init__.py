"""ONNX files as float graphs: `read_onnx` reads one, `import_graph` converts it, `OnnxNetwork` stands in for a torch network."""

from bitdial.graph.onnx.importer import import_graph
from bitdial.graph.onnx.network import OnnxNetwork
from bitdial.graph.onnx.reading import OnnxModel, is_onnx, read_onnx

__all__ = ["OnnxModel", "OnnxNetwork", "import_graph", "is_onnx", "read_onnx"]
