"""Several requests as one batch: checked, joined along the batch axis, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import InputError
from bitdial.serving.worker.info import ModelInfo, TensorInfo

Array = npt.NDArray[Any]


def count_samples(info: ModelInfo, requests: Sequence[Sequence[Array]], max_batch: int) -> list[int]:
    """Samples of each request. Raises InputError for wrong numbers, dtypes or shapes of arrays, for requests without samples, and
    for more than max_batch samples in all."""
    samples = []
    for arrays in requests:
        if len(arrays) != len(info.inputs):
            names = [t.name for t in info.inputs]
            raise InputError(f"the model takes {len(names)} input(s) {names}, got {len(arrays)}")
        count = 0
        for tensor, array in zip(info.inputs, arrays, strict=True):
            if array.dtype != tensor.numpy_dtype:
                raise InputError(f"input '{tensor.name}' is {array.dtype}, the model takes {tensor.dtype}: convert it")
            own = tensor.samples_of(array.shape)
            if not own:
                raise InputError(f"input '{tensor.name}' has shape {list(array.shape)}, the model takes {tensor}")
            if count and own != count:
                raise InputError(f"input '{tensor.name}' holds {own} samples, input '{info.inputs[0].name}' {count}")
            count = own
        samples.append(count)
    total = sum(samples)
    if not samples or total > max_batch:
        raise InputError(f"a batch holds 1 to {max_batch} samples, got {total}: send fewer at once")
    return samples


def part(tensor: TensorInfo, array: Array, start: int, samples: int) -> Array:
    """View of `samples` samples of a batch from sample `start` on."""
    span = slice(start * tensor.batch_factor, (start + samples) * tensor.batch_factor)
    axis = tensor.axis
    return array[span] if axis == 0 else array[(slice(None),) * axis + (span,)]


def join(info: ModelInfo, requests: Sequence[Sequence[Array]]) -> list[Array]:
    """One array per input, all requests behind each other."""
    if len(requests) == 1:
        return list(requests[0])
    return [
        np.concatenate([arrays[i] for arrays in requests], axis=tensor.axis) for i, tensor in enumerate(info.inputs)
    ]


def fill(info: ModelInfo, targets: Sequence[Array], requests: Sequence[Sequence[Array]]) -> None:
    """As `join`, into arrays of the right shapes that are there already."""
    for i, (tensor, target) in enumerate(zip(info.inputs, targets, strict=True)):
        np.concatenate([arrays[i] for arrays in requests], axis=tensor.axis, out=target)


def split(
    info: ModelInfo, outputs: Sequence[Array], samples: Sequence[int], checked: Sequence[str]
) -> list[list[Array]]:
    """[request][output] from outputs that hold the samples of the good requests only (`checked` is ""), in order."""
    if len(samples) == 1:
        return [[] if checked[0] else list(outputs)]
    ends = list(accumulate(n for n, problem in zip(samples, checked, strict=True) if not problem))
    if not ends:
        return [[] for _ in checked]
    columns = []
    for tensor, array in zip(info.outputs, outputs, strict=True):
        factor, starts = tensor.batch_factor, [0, *ends]
        if tensor.axis == 0:
            columns.append([array[a * factor : b * factor] for a, b in zip(starts, ends, strict=False)])
        else:
            parts = (part(tensor, array, a, b - a) for a, b in zip(starts, ends, strict=False))
            columns.append([np.ascontiguousarray(p) for p in parts])
    rows = iter([list(row) for row in zip(*columns, strict=True)])
    return [[] if problem else next(rows) for problem in checked]
