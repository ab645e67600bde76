"""The tensors of a file, handed out one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ArtifactError

Array = npt.NDArray[Any]


class Tensors:
    """The tensors of the file, each to be taken once with the dtype and shape that the manifest leads to expect."""

    def __init__(self, tensors: dict[str, Array], where: str) -> None:
        self._rest = dict(tensors)
        self.where = where

    def take(self, name: str, dtype: type[np.generic] | None, shape: tuple[int, ...] | None) -> Array:
        """`None`: any. Floats must be numbers, and finite but for -inf in constants (attention masks)."""
        if name not in self._rest:
            raise ArtifactError.damaged(self.where, f"tensor '{name:.100}' is missing")
        array = self._rest.pop(name)
        if (dtype is not None and array.dtype != dtype) or (shape is not None and array.shape != shape):
            raise ArtifactError.damaged(
                self.where,
                f"tensor '{name:.100}' is {array.dtype}{list(array.shape)}, not what the manifest says "
                f"({'any' if dtype is None else np.dtype(dtype).name}{'' if shape is None else list(shape)})",
            )
        if array.dtype.kind == "f":
            fine = np.isfinite(array)
            if name.startswith("constants/"):
                fine |= np.isneginf(array)
            if not fine.all():
                raise ArtifactError(
                    f"{self.where}: tensor '{name:.100}' holds NaN or infinity; quantize and save again"
                )
        return array

    def size(self, name: str) -> int:
        """Elements of a tensor, 0 if it is missing."""
        return self._rest[name].size if name in self._rest else 0

    def done(self) -> None:
        if self._rest:
            raise ArtifactError.damaged(self.where, f"unknown tensor '{sorted(self._rest)[0]:.100}'")
