"""NVIDIA's driver as a device: one stream, kernels compiled by NVRTC, launches recorded as CUDA graphs."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bitdial.engines.cuda import compilation
from bitdial.engines.cuda.arguments import Launch, Span
from bitdial.engines.cuda.device import ARCHITECTURES, NATIVE_INT4, DeviceLostError, DeviceMemoryError
from bitdial.errors import EngineError

OUT_OF_MEMORY = 2
# After these the driver answers nothing in this process any more: uncorrectable memory, NVLink, illegal addresses and
# instructions, time-outs, asserts, hardware stacks, alignment, address spaces, counters, failed launches, unknown.
LOST = frozenset({214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 722, 999})
MOST_BLOCKS = 65535  # along the second and third axis of a grid
NODES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvhost-ctrl-gpu", "nvgpu")  # of a GPU in /dev: servers, WSL, Jetson


def missing() -> str:
    """ "" if there is a GPU that the engine can use, else what is missing and how to get it.

    The driver is not started: processes made by fork could not use it any more.
    """
    problem = compilation.missing() or bindings_missing()
    if problem:
        return problem
    if not any(list(Path("/dev").glob(node)) for node in NODES):
        return "no NVIDIA GPU is here"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"NVIDIA's driver does not load ({error}): install it, version 580 or newer"
    return ""


def bindings_missing() -> str:
    """ "" if the interface to the driver is installed."""
    try:
        found = importlib.util.find_spec("cuda.bindings.driver")
    except ModuleNotFoundError:
        found = None
    return "" if found is not None else f"cuda-bindings is not installed: {compilation.INSTALL}"


def architecture_for(major: int, minor: int) -> str | None:
    """The architecture whose machine code runs on a compute capability: the same major, at most the same minor number."""
    known = [tuple(divmod(int(a.removeprefix("sm_")), 10)) for a in ARCHITECTURES]
    fitting = [k for k in known if k[0] == major and k[1] <= minor]
    return "sm_{}{}".format(*max(fitting)) if fitting else None


def open_device(gpu: int = 0, cuda: Any = None, compile_kernels: Callable[[str], bytes] = compilation.compile_kernels) -> Driver:
    """The GPU of that number. cuda: the driver's binding, for tests. Raises EngineError that says what is missing."""
    if cuda is None:
        cuda = importlib.import_module("cuda.bindings.driver")
    if isinstance(gpu, bool) or not isinstance(gpu, int) or gpu < 0:
        raise EngineError(f"gpu must be a whole number from 0, got {gpu!r}")
    return Driver(cuda, gpu, compile_kernels)


class Driver:
    """A GPU with a stream of its own, so that several engines on one GPU do not wait for each other."""

    def __init__(self, cuda: Any, gpu: int, compile_kernels: Callable[[str], bytes]) -> None:
        self._cuda, self.name = cuda, f"GPU {gpu}"
        self._call("cuInit", 0)
        count = self._call("cuDeviceGetCount")
        if gpu >= count:
            raise EngineError(f"there is no GPU {gpu}: the driver counts {count}")
        device = self._device = self._call("cuDeviceGet", gpu)
        self.name = self._call("cuDeviceGetName", 128, device).split(b"\0")[0].decode(errors="replace")
        attributes = cuda.CUdevice_attribute
        major, minor, self.multiprocessors = (
            int(self._call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), device))
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        )
        architecture = architecture_for(major, minor)
        if architecture is None:
            raise EngineError(
                f"{self.name} is of compute capability {major}.{minor}, which has no kernels here: they are made for "
                f"{', '.join(ARCHITECTURES)} (8.0 to 12.x); run the model with engine='cpu'"
            )
        self.architecture = architecture
        self.native_int4 = architecture in NATIVE_INT4
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self._enter()
        self._stream = self._call("cuStreamCreate", 1)  # does not wait for the default stream
        self._module = self._call("cuModuleLoadData", compile_kernels(architecture))
        self._functions: dict[str, Any] = {}

    def _call(self, function: str, *args: Any) -> Any:
        try:
            status, *values = getattr(self._cuda, function)(*args)
        except RuntimeError as error:  # the library is not there
            raise EngineError(f"NVIDIA's driver does not load: {error}") from None
        if int(status):
            raise self._error(function, int(status), str(getattr(status, "name", status)))
        return values[0] if len(values) == 1 else None

    def _error(self, function: str, code: int, name: str) -> EngineError:
        if code == OUT_OF_MEMORY:
            return DeviceMemoryError(f"{self.name}: {function} finds no memory left")
        if code in LOST:
            return DeviceLostError(f"{self.name} is lost ({function}: {name}): start the process anew; dmesg says more (Xid)")
        if function == "cuModuleLoadData":
            return EngineError(f"{self.name} does not take the kernels ({name}): its driver must be version 580 or newer")
        return EngineError(f"{self.name}: {function} failed with {name}")

    def _enter(self) -> None:
        """The calling thread may be another one than before."""
        self._call("cuCtxSetCurrent", self._context)

    # ---- memory ------------------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> Span:
        self._enter()
        return Span(int(self._call("cuMemAlloc", size)), size)

    def free(self, span: Span) -> None:
        self._enter()
        self._call("cuStreamSynchronize", self._stream)
        self._call("cuMemFree", span.address)

    def upload(self, span: Span, data: npt.NDArray[Any]) -> None:
        assert data.nbytes <= span.size and data.flags.c_contiguous
        self._enter()  # memory that is not pinned is copied before the call returns
        self._call("cuMemcpyHtoDAsync", span.address, data.ctypes.data, data.nbytes, self._stream)

    def download(self, span: Span, out: npt.NDArray[Any]) -> None:
        assert out.nbytes <= span.size and out.flags.c_contiguous
        self._enter()
        self._call("cuMemcpyDtoHAsync", out.ctypes.data, span.address, out.nbytes, self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def wait(self) -> None:
        self._enter()
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self._enter()
        self._call("cuStreamSynchronize", self._stream)
        self._call("cuModuleUnload", self._module)
        self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)

    # ---- launches ----------------------------------------------------------------------------------------------------------

    def record(self, launches: Sequence[Launch]) -> Graph:
        """The launches as a CUDA graph; arguments are copied into it."""
        self._prepare(launches)
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        problem: EngineError | None = None
        try:
            for launch in launches:
                self._launch(launch)
        except EngineError as error:
            problem = error
        try:
            graph = self._call("cuStreamEndCapture", self._stream)
        except EngineError as error:  # as a rule because of the first one
            raise problem or error from None
        if problem is not None:
            self._call("cuGraphDestroy", graph)
            raise problem
        try:
            return Graph(self, self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def seconds(self, launches: Sequence[Launch]) -> list[float]:
        """What each takes between two events on the stream, outside of a graph."""
        self._prepare(launches)
        events: list[Any] = []
        try:
            for _ in range(len(launches) + 1):
                events.append(self._call("cuEventCreate", 0))
            self._call("cuEventRecord", events[0], self._stream)
            for launch, event in zip(launches, events[1:], strict=True):
                self._launch(launch)
                self._call("cuEventRecord", event, self._stream)
            self._call("cuStreamSynchronize", self._stream)
            pairs = zip(events, events[1:], strict=False)
            return [float(self._call("cuEventElapsedTime", begin, end)) / 1e3 for begin, end in pairs]
        finally:
            for event in events:
                self._call("cuEventDestroy", event)

    def _prepare(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            if max(launch.grid[1:]) > MOST_BLOCKS or launch.grid[0] >= 2**31:
                raise EngineError(f"{launch.kernel}: a grid of {launch.grid} blocks is too large: use a smaller batch")
        self._enter()
        for launch in launches:  # loading a function is not allowed while a stream records
            self._function(launch.kernel)

    def _function(self, kernel: str) -> Any:
        if kernel not in self._functions:
            function = self._call("cuModuleGetFunction", self._module, kernel.encode())
            if hasattr(self._cuda, "cuFuncLoad"):  # else at its first launch
                self._call("cuFuncLoad", function)
            self._functions[kernel] = function
        return self._functions[kernel]

    def _launch(self, launch: Launch) -> None:
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        self._call(
            "cuLaunchKernel", self._function(launch.kernel), *launch.grid, launch.threads, 1, 1, launch.shared_bytes,
            self._stream, ctypes.addressof(parameters), 0,
        )  # fmt: skip


class Graph:
    """An instantiated CUDA graph."""

    def __init__(self, driver: Driver, executable: Any) -> None:
        self._driver, self._executable = driver, executable

    def run(self) -> None:
        self._driver._enter()
        self._driver._call("cuGraphLaunch", self._executable, self._driver._stream)

    def close(self) -> None:
        self._driver._enter()
        self._driver._call("cuStreamSynchronize", self._driver._stream)
        self._driver._call("cuGraphExecDestroy", self._executable)

