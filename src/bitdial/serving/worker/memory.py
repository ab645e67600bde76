"""Shared memory of a worker: the inputs and outputs of one batch, in an anonymous file that both processes map."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.serving.worker.info import ModelInfo, TensorInfo

Array = npt.NDArray[Any]

ALIGNMENT = 4096  # of each tensor, so that none shares a page with another


class BatchMemory:
    """One place per input and output, each large enough for max_batch samples; a batch lies at its beginning, row-major.

    Both processes compute the same layout from the model's tensors. The worker's end (`grow`) sets the file's size and seals
    it, so that neither side can be made to touch memory behind its end. Pages are taken when first used.
    """

    def __init__(self, descriptor: int, info: ModelInfo, max_batch: int, grow: bool = False) -> None:
        self._inputs: list[tuple[TensorInfo, np.dtype[Any], int]] = []
        self._outputs: list[tuple[TensorInfo, np.dtype[Any], int]] = []
        size = 0
        for tensors, places in ((info.inputs, self._inputs), (info.outputs, self._outputs)):
            for tensor in tensors:
                dtype = np.dtype(tensor.dtype)
                places.append((tensor, dtype, size))
                count = dtype.itemsize
                for dim in tensor.of(max_batch):
                    count *= dim
                size += -(-count // ALIGNMENT) * ALIGNMENT
        self.size = size
        if grow:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        if os.fstat(descriptor).st_size != size:
            raise ValueError(f"shared memory of {os.fstat(descriptor).st_size} bytes, {size} expected")
        self._map = mmap.mmap(descriptor, size)

    def inputs(self, samples: int) -> list[Array]:
        """Views of the inputs of a batch of so many samples. They must be gone before `close`."""
        return [np.ndarray(t.of(samples), d, self._map, at) for t, d, at in self._inputs]

    def outputs(self, samples: int) -> list[Array]:
        """Views of the outputs, as `inputs`."""
        return [np.ndarray(t.of(samples), d, self._map, at) for t, d, at in self._outputs]

    def close(self) -> None:
        """Unmap."""
        with contextlib.suppress(BufferError):  # a view is still there: unmapped when it goes
            self._map.close()
