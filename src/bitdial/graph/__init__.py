"""The network as a small, typed, printable graph: capture from torch.export, verify, fold, fuse."""

from bitdial.graph.ir import BatchDim, Dim, Graph, Node, Shape, TensorType
from bitdial.graph.verify import verify

__all__ = ["BatchDim", "Dim", "Graph", "Node", "Shape", "TensorType", "verify"]
