"""A stand-in for cuda.bindings.driver: the calls that the engine makes, on the emulated device, with errors on demand."""

from __future__ import annotations

import ctypes
import time
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from bitdial.engines.cuda.arguments import Span
from bitdial.engines.cuda.device import DeviceMemoryError
from bitdial.engines.cuda.emulated import EmulatedDevice


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeCuda:
    """failing: function -> status that it gives from now on. calls: names in order. counts: GPUs."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )  # fmt: skip

    def __init__(self, device: EmulatedDevice, capability: tuple[int, int] = (9, 0), count: int = 1) -> None:
        self.device, self.capability, self.count = device, capability, count
        self.failing: dict[str, Status] = {}
        self.calls: list[str] = []
        self.captured: list[tuple[Any, ...]] | None = None
        self.graphs = self.events = self.streams = 0
        self.launched: list[str] = []  # the stream of every graph
        self._spans: dict[int, Span] = {}

    def __getattr__(self, name: str) -> Any:
        work = getattr(type(self), f"do_{name}", None)
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.failing:
                return self.failing[name], None
            try:
                result = None if work is None else work(self, *args)
            except DeviceMemoryError:
                return Status.CUDA_ERROR_OUT_OF_MEMORY, None
            return (Status.CUDA_SUCCESS,) if result is None else (Status.CUDA_SUCCESS, result)

        return call

    def do_cuDeviceGetCount(self) -> int:
        return self.count

    def do_cuDeviceGet(self, number: int) -> int:
        return number

    def do_cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Imaginary GPU" + bytes(length - 13)

    def do_cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.device.multiprocessors if attribute == 16 else self.capability[attribute - 75]

    def do_cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def do_cuStreamCreate(self, flags: int) -> str:
        self.streams += 1
        return f"stream {self.streams}"

    def do_cuModuleLoadData(self, cubin: bytes) -> str:
        return "module"

    def do_cuModuleGetFunction(self, module: str, name: bytes) -> str:
        return name.decode()

    def do_cuMemAlloc(self, size: int) -> int:
        span = self.device.allocate(size)
        self._spans[span.address] = span
        return span.address

    def do_cuMemFree(self, address: int) -> None:
        self.device.free(self._spans.pop(address))

    def do_cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: str) -> None:
        ctypes.memmove(to, source, size)

    def do_cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: str) -> None:
        ctypes.memmove(to, source, size)

    def do_cuStreamBeginCapture(self, stream: str, mode: int) -> None:
        self.captured = []

    def do_cuStreamEndCapture(self, stream: str) -> list[Any]:
        assert self.captured is not None
        captured, self.captured = self.captured, None
        return captured

    def do_cuGraphInstantiate(self, graph: list[Any], flags: int) -> list[Any]:
        self.graphs += 1
        return list(graph)

    def do_cuGraphExecDestroy(self, graph: list[Any]) -> None:
        self.graphs -= 1

    def do_cuLaunchKernel(self, function: str, x: int, y: int, z: int, tx: int, ty: int, tz: int, shared: int, stream: str,
                          parameters: int, extra: int) -> None:  # fmt: skip
        assert (ty, tz, extra) == (1, 1, 0)
        size = self.device.arguments_size(function)
        address = ctypes.c_void_p.from_address(parameters).value
        assert address is not None
        arguments = np.frombuffer(ctypes.string_at(address, size), np.uint8).copy()  # a graph keeps its own
        work = (function, (x, y, z), tx, shared, arguments)
        if self.captured is None:
            self.do_cuGraphLaunch([work], stream)
        else:
            self.captured.append(work)

    def do_cuEventCreate(self, flags: int) -> list[float]:
        self.events += 1
        return []

    def do_cuEventDestroy(self, event: list[float]) -> None:
        self.events -= 1

    def do_cuEventRecord(self, event: list[float], stream: str) -> None:
        event.append(time.perf_counter())

    def do_cuEventElapsedTime(self, begin: list[float], end: list[float]) -> float:
        return 1e3 * (end[-1] - begin[-1])

    def do_cuGraphLaunch(self, graph: list[Any], stream: str) -> None:
        self.launched.append(stream)
        for function, grid, threads, shared, arguments in graph:
            assert threads == self.device.threads(function)
            self.device.launch_raw(function, grid, shared, arguments.ctypes.data, arguments.size)
