"""The kernels on the host: their own sources, compiled as C++ against an emulator of warps, fragments and shared memory.

It proves results, not speed: every access is checked for bounds and for races between barriers. The library is compiled by the
C++ compiler at hand.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cuda.arguments import Launch, Span
from bitdial.engines.cuda.device import ALIGNMENT, DeviceMemoryError, sources
from bitdial.errors import EngineError

# A host compiler does not unroll for the device; everything else is an error, as for the CPU engine.
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]


def find_compiler() -> str | None:
    """The C++ compiler as scripts/environment.sh finds it, or None."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for c in candidates if (path := shutil.which(c))), None)


def build(folder: Path, native_int4: bool, extra: Path | None = None) -> Path:
    """The emulator as a library in `folder`, compiled if it does not lie there yet. extra: a file of further kernels.

    Raises EngineError without a compiler, or with what the compiler says.
    """
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("the emulated device needs a C++ compiler: install GCC 9 or newer, or Clang")
    texts = [p for p in sorted(sources().rglob("*")) if p.is_file()] + ([extra] if extra else [])
    digest = hashlib.sha256(f"{compiler} {FLAGS} {native_int4}".encode())
    for path in texts:
        digest.update(path.read_bytes())
    library = folder / f"emulation-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, "-DBITDIAL_EMULATION", f"-DBITDIAL_NATIVE_INT4={int(native_int4)}",
               *([f'-DBITDIAL_MORE_KERNELS="{extra}"'] if extra else []),
               str(sources() / "emulation" / "emulator.cpp"), "-o", str(unfinished)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the emulated device does not compile: {done.stderr[-2000:]}")
    unfinished.replace(library)
    return library


class EmulatedDevice:
    """A device of the host. memory: bytes that it has, to try what happens when they run out. multiprocessors: that it says it
    has; few, so that small layers come in blocks of either kind."""

    def __init__(self, library: Path, native_int4: bool, memory: int = 1 << 30, multiprocessors: int = 4) -> None:
        self.name = "emulated device"
        self.architecture = "sm_86" if native_int4 else "sm_90"
        self.native_int4, self.multiprocessors = native_int4, multiprocessors
        self.left = memory
        self.launches: list[str] = []  # kernels that ran, by name
        self._memory: dict[int, npt.NDArray[np.uint8]] = {}
        self._library = ctypes.CDLL(str(library))
        self._library.bitdial_emulate.restype = ctypes.c_char_p
        self._library.bitdial_emulate.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t,
        ]  # fmt: skip
        self._library.bitdial_kernels.restype = ctypes.c_char_p
        self._library.bitdial_products.restype = ctypes.c_uint64
        for query in (self._library.bitdial_arguments_size, self._library.bitdial_threads):
            query.argtypes = [ctypes.c_char_p]

    @property
    def kernels(self) -> list[str]:
        return str(self._library.bitdial_kernels().decode()).split()

    @property
    def products(self) -> int:
        """Tensor-core instructions that warps have run in this process, on all devices of the same library."""
        return int(self._library.bitdial_products())

    def allocate(self, size: int) -> Span:
        if size > self.left:
            raise DeviceMemoryError(f"{self.name}: no memory for {size} bytes more ({self.left} are left)")
        self.left -= size
        data = np.full(size + ALIGNMENT, 0xA5, np.uint8)  # what nobody wrote shows
        address = -(-data.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[address] = data
        return Span(address, size)

    def free(self, span: Span) -> None:
        del self._memory[span.address]
        self.left += span.size

    def upload(self, span: Span, data: npt.NDArray[Any]) -> None:
        assert data.nbytes <= span.size and data.flags.c_contiguous
        ctypes.memmove(span.address, data.ctypes.data, data.nbytes)

    def download(self, span: Span, out: npt.NDArray[Any]) -> None:
        assert out.nbytes <= span.size and out.flags.c_contiguous
        ctypes.memmove(out.ctypes.data, span.address, out.nbytes)

    def launch(self, launch: Launch) -> None:
        """Run a kernel. Raises EngineError for what the emulator finds wrong."""
        args = launch.arguments
        self.launch_raw(launch.kernel, launch.grid, launch.shared_bytes, ctypes.addressof(args), ctypes.sizeof(args))

    def launch_raw(self, kernel: str, grid: tuple[int, int, int], shared_bytes: int, arguments: int, size: int) -> None:
        """As the driver takes it; arguments: the address of the structure."""
        blocks = (ctypes.c_int * 3)(*grid)
        said = self._library.bitdial_emulate(kernel.encode(), blocks, shared_bytes, arguments, size).decode()
        self.launches.append(kernel)
        if said:
            raise EngineError(f"{kernel}: {said}")

    def arguments_size(self, kernel: str) -> int:
        """Bytes of a kernel's structure of arguments."""
        return int(self._library.bitdial_arguments_size(kernel.encode()))

    def threads(self, kernel: str) -> int:
        """Threads of a kernel's blocks."""
        return int(self._library.bitdial_threads(kernel.encode()))

    def wait(self) -> None:
        """Everything is done at once."""

    def close(self) -> None:
        """Its memory lives as long as it does."""

    def seconds(self, launches: Sequence[Launch]) -> list[float]:
        """Of the emulation: they say nothing about a device."""
        found = []
        for launch in launches:
            begin = time.perf_counter()
            self.launch(launch)
            found.append(time.perf_counter() - begin)
        return found

    def record(self, launches: Sequence[Launch]) -> _Sequence:
        return _Sequence(self, list(launches))


class _Sequence:
    def __init__(self, device: EmulatedDevice, launches: list[Launch]) -> None:
        self.device, self.launches = device, launches

    def run(self) -> None:
        for launch in self.launches:
            self.device.launch(launch)

    def close(self) -> None:
        self.launches.clear()
