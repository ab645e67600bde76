"""Small ONNX models, what ONNX Runtime makes of them, and what the imported graph does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.onnx import import_graph, read_onnx

Array = np.ndarray[Any, Any]
ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}


def model(
    nodes: Sequence[Any],
    inputs: dict[str, Array],
    constants: dict[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 17,
    batch: int | str = "N",
    dtype: str = "float32",
) -> Any:
    """A ModelProto. inputs: by name, batch first (only their shapes and dtypes matter); batch: the first size in the file; dtype:
    of the outputs."""
    infos = [
        helper.make_tensor_value_info(k, ELEMENTS[v.dtype.name], [batch, *v.shape[1:]]) for k, v in inputs.items()
    ]
    results = [helper.make_tensor_value_info(name, ELEMENTS[dtype], None) for name in outputs]
    tensors = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", infos, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def expected(proto: Any, inputs: dict[str, Array], *, singly: bool = False) -> list[Array]:
    """The outputs by ONNX Runtime; singly: sample by sample, for files of a fixed batch of 1."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if not singly:
        return list(session.run(None, inputs))
    n = len(next(iter(inputs.values())))
    runs = [session.run(None, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(n)]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def imported(proto: Any, inputs: dict[str, Array], folder: Path) -> tuple[Graph, list[Array]]:
    """The graph of a model, and its outputs."""
    path = folder / "model.onnx"
    onnx.save(proto, path)
    graph = import_graph(read_onnx(path), [v.shape[1:] for v in inputs.values()])
    with torch.no_grad():
        outputs = run_graph(graph, [torch.from_numpy(np.array(v)) for v in inputs.values()])
    return graph, [y.numpy() for y in outputs]


def check(
    folder: Path,
    nodes: Sequence[Any],
    inputs: dict[str, Array],
    constants: dict[str, Array] | None = None,
    *,
    fixed: bool = False,
    tolerance: float = 1e-5,
    **more: Any,
) -> Graph:
    """Assert that the imported graph computes what ONNX Runtime does, up to a share of the largest number; return the graph.

    fixed: the file has a batch of 1, the imported graph still takes any.
    """
    proto = model(nodes, inputs, constants, batch=1 if fixed else "N", **more)
    wanted = expected(proto, inputs, singly=fixed)
    graph, got = imported(proto, inputs, folder)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max(initial=1e-6)))
    return graph
