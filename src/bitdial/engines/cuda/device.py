"""What the engine asks of a device. Two exist: NVIDIA's driver (`driver`) and the emulation on the host (`emulated`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitdial.engines.cuda.arguments import Launch, Span
from bitdial.errors import EngineError, EngineLostError

ALIGNMENT = 256  # bytes; of everything that lies in one allocation
NATIVE_INT4 = ("sm_80", "sm_86", "sm_87", "sm_89")  # tensor cores that multiply 4-bit numbers
ARCHITECTURES = (*NATIVE_INT4, "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")  # that kernels are made for


class DeviceMemoryError(EngineError):
    """The device has no memory left for what was asked. What it holds stays usable."""


class DeviceLostError(EngineLostError):
    """The device does not answer any more; the process must be started anew."""


class Recorded(Protocol):
    """Launches in a fixed order, as one unit: a CUDA graph."""

    def run(self) -> None: ...
    def close(self) -> None: ...


class Device(Protocol):
    """name: of the product. architecture: "sm_90" and the like. native_int4: whether its tensor cores multiply 4-bit numbers.
    multiprocessors: how many it has.

    All methods raise DeviceMemoryError or DeviceLostError, and other EngineErrors, that name the device. Work is done in order;
    `download` and `wait` wait for it. `seconds` runs launches one by one and says how long each took on the device.
    """

    name: str
    architecture: str
    native_int4: bool
    multiprocessors: int

    def allocate(self, size: int) -> Span: ...
    def free(self, span: Span) -> None: ...
    def upload(self, span: Span, data: npt.NDArray[Any]) -> None: ...
    def download(self, span: Span, out: npt.NDArray[Any]) -> None: ...
    def record(self, launches: Sequence[Launch]) -> Recorded: ...
    def seconds(self, launches: Sequence[Launch]) -> list[float]: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


def sources() -> Path:
    """The folder of the kernels' sources: beside this file where installed, else in the repository."""
    installed = Path(__file__).parent / "kernels"
    return installed if installed.is_dir() else Path(__file__).parents[4] / "csrc" / "cuda"


class Pool:
    """Constants of an engine, gathered first and then laid into one allocation."""

    def __init__(self) -> None:
        self.arrays: list[npt.NDArray[Any]] = []
        self.offsets: list[int] = []
        self.size = 0
        self.span: Span | None = None

    def add(self, array: npt.NDArray[Any]) -> int:
        """The constant's number."""
        assert self.span is None
        self.arrays.append(np.ascontiguousarray(array))
        self.offsets.append(self.size)
        self.size += -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        return len(self.arrays) - 1

    def upload(self, device: Device) -> None:
        self.span = device.allocate(max(self.size, ALIGNMENT))
        for index, array in enumerate(self.arrays):
            if array.nbytes:
                device.upload(self.at(index), array)

    def at(self, index: int) -> Span:
        assert self.span is not None
        return Span(self.span.address + self.offsets[index], self.arrays[index].nbytes)
