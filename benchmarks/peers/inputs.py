"""The file of an input batch, one array per input of the network. Needs NumPy only, since contestants read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = list[npt.NDArray[Any]]  # samples first


def write_inputs(path: Path, arrays: Sequence[npt.NDArray[Any]]) -> None:
    with path.open("wb") as stream:
        np.savez(stream, *arrays)


def read_inputs(path: str | Path) -> Arrays:
    with np.load(path) as stored:
        return [np.ascontiguousarray(stored[f"arr_{i}"]) for i in range(len(stored.files))]
