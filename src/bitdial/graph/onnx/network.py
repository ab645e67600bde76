"""An ONNX file in the place of a torch network: it can be called, and its graph is read instead of captured."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitdial.errors import CaptureError
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.onnx.importer import clean, import_graph
from bitdial.graph.onnx.reading import read_onnx


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, in float. Its parameters are named like the file's inputs, as far as Python allows.

    Called with tensors, batch first, it gives its outputs, a tuple of them for several. Sizes that the file leaves open are taken
    from what it is called with. Raises CaptureError for a file that cannot be read, and for inputs that it does not take.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.model = read_onnx(self.path)
        self._graphs: dict[Any, tuple[Graph, dict[str, Tensor]]] = {}
        names: list[str] = []
        for spec in self.model.inputs:
            name = clean(spec.name, identifier=True)
            names.append(name if name not in names else f"{name}_{len(names)}")
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        self.signature = inspect.Signature(parameters)
        self.forward = _signed(self.run, self.signature)
        self.eval()

    def graph(self, inputs: Sequence[Tensor], names: Sequence[str] | None = None) -> Graph:
        """The float graph for inputs of these shapes; names: of the inputs, if they are not all in order. Raises CaptureError."""
        own = list(self.signature.parameters)
        if len(inputs) != len(own) or (names is not None and list(names) != own):
            given = ", ".join(names) if names is not None else f"{len(inputs)} of them"
            raise CaptureError(f"{self.path} takes the inputs {', '.join(own)}, got {given}: pass dicts by these names")
        return self._graph(inputs)[0]

    def _graph(self, inputs: Sequence[Tensor]) -> tuple[Graph, dict[str, Tensor]]:
        for spec, x in zip(self.model.inputs, inputs, strict=False):
            if x.dim() == 0 or str(x.dtype).removeprefix("torch.") != spec.dtype:
                raise CaptureError(f"{self.path} takes '{spec.name}' as {spec}, not {x.dtype} {list(x.shape)}: convert it first")
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        if shapes not in self._graphs:
            graph = import_graph(self.model, shapes)
            self._graphs = {shapes: (graph, constant_tensors(graph))}  # of the last shapes only
        return self._graphs[shapes]

    def run(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What `forward` does; that has the signature of this very network."""
        bound = self.signature.bind(*inputs, **named).args
        graph, constants = self._graph(bound)
        outputs = run_graph(graph, bound, constants=constants)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _signed(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A function that says it has this signature."""

    def forward(*inputs: Tensor, **named: Tensor) -> Any:
        return function(*inputs, **named)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
