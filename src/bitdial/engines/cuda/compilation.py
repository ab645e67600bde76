"""The kernels compiled to machine code by NVRTC. Needs no GPU, no driver and no toolkit: only NVIDIA's compiler from PyPI.

What was compiled is kept in the cache folder (see `bitdial.files.cache_folder`), and used as long as the sources are the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdial.engines.cuda.device import ARCHITECTURES, NATIVE_INT4, sources
from bitdial.errors import EngineError, OutputError
from bitdial.files import cache_folder, write_atomically

INSTALL = "pip install bitdial[cuda]"


def kept(architecture: str) -> Path:
    """Where the machine code of the present sources is kept."""
    digest = hashlib.sha256(json.dumps(options(architecture)).encode())
    for path in [sources() / "kernels.cu", *sorted(sources().glob("*.h"))]:
        digest.update(path.read_bytes() + b"\0")
    return cache_folder() / "cuda" / f"{architecture}-{digest.hexdigest()[:32]}.cubin"


def missing() -> str:
    """ "" if kernels can be compiled, or are kept, else what is missing and how to get it."""
    if any(kept(architecture).exists() for architecture in ARCHITECTURES):
        return ""
    return compiler_missing()


def compiler_missing() -> str:
    """ "" if kernels can be compiled, else what is missing and how to get it."""
    try:
        if importlib.util.find_spec("cuda.bindings.nvrtc") is None:
            return f"cuda-bindings is not installed: {INSTALL}"
    except ModuleNotFoundError:
        return f"cuda-bindings is not installed: {INSTALL}"
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as error:  # it finds the library at the first call, and fails in ways of its own
        return f"NVIDIA's run-time compiler does not load ({str(error)[:200]}): {INSTALL}"
    return ""


def options(architecture: str) -> list[str]:
    native = int(architecture in NATIVE_INT4)
    return [f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=false", f"-DBITDIAL_NATIVE_INT4={native}"]


@functools.cache
def compile_kernels(architecture: str) -> bytes:
    """Machine code (a cubin) of all kernels for an architecture: what is kept, else compiled now. Raises EngineError."""
    path = kept(architecture)
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code = compile_now(architecture)
    with contextlib.suppress(OSError, OutputError):  # a folder that cannot be written costs the time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, code)
    return code


def compile_now(architecture: str, more: Sequence[str] = ()) -> bytes:
    """As `compile_kernels`, without what is kept. more: options of the compiler, such as definitions."""
    problem = compiler_missing()
    if problem:
        raise EngineError(f"the CUDA kernels cannot be compiled: {problem}")
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    folder = sources()
    headers = sorted(folder.glob("*.h"))
    texts = [h.read_bytes() for h in headers]
    names = [h.name.encode() for h in headers]
    status, program = nvrtc.nvrtcCreateProgram((folder / "kernels.cu").read_bytes(), b"kernels.cu", len(texts), texts, names)
    _check(nvrtc, status)
    try:
        flags = [o.encode() for o in (*options(architecture), *more)]
        status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]
        if int(status):
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise EngineError(
                f"the CUDA kernels do not compile for {architecture} with this NVRTC: "
                f"{log.decode(errors='replace')[:2000]}"
            )
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, status)
        cubin = bytearray(size)
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin)[0])
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _check(nvrtc: Any, status: Any) -> None:
    if int(status):
        raise EngineError(f"NVIDIA's run-time compiler failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
