"""What a caller passes as a batch, against what a graph takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitdial.errors import InputError
from bitdial.graph.ir import BatchDim, Values


def split_batch(graph: Values, batch: Any) -> list[Any]:
    """The parts of a batch, one NumPy array or torch tensor per graph input, in order, of the dtypes that the graph takes.

    batch: an array or tensor; for several inputs a sequence of them, or a dict by name. Shapes are `check_inputs`' part.
    Raises InputError.
    """
    names = graph.inputs
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise InputError(f"the batch is a dict without {missing}: the model takes {names}")
        parts = [batch[name] for name in names]
    else:
        many = isinstance(batch, (list, tuple)) and len(names) > 1
        parts = list(batch) if many else [batch]
    if len(parts) != len(names):
        raise InputError(f"the model takes {len(names)} inputs {names}: pass a sequence of them")
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, np.ndarray) and not hasattr(part, "detach"):  # the latter: a tensor, told without torch
            raise InputError(f"input '{name}' is a {type(part).__name__}: pass a torch tensor or a NumPy array")
        got, expected = str(part.dtype).removeprefix("torch."), graph.types[name].dtype
        if got != expected:
            raise InputError(f"input '{name}' is {got}, the model takes {expected}: convert it first")
    return parts


def check_inputs(graph: Values, inputs: Sequence[Any]) -> int:
    """Check number and shapes of the inputs against the graph; return the batch size. Raises InputError."""
    if len(inputs) != len(graph.inputs):
        raise InputError(f"the model takes {len(graph.inputs)} input(s) {graph.inputs}, got {len(inputs)}")
    batch: int | None = None
    for name, tensor in zip(graph.inputs, inputs, strict=True):
        expected = graph.types[name].shape
        shape = tuple(tensor.shape)
        wrong = InputError(
            f"input '{name}' has shape {list(shape)}, the model takes {graph.types[name]} (N = batch size): "
            "resize or crop the data, or quantize the model again for this shape"
        )
        if len(shape) != len(expected):
            raise wrong
        for got, want in zip(shape, expected, strict=True):
            if isinstance(want, BatchDim):
                if got == 0 or got % want.factor:
                    raise wrong
                if batch is None:
                    batch = got // want.factor
                if batch != got // want.factor:
                    raise wrong
            elif got != want:
                raise wrong
    return 1 if batch is None else batch
