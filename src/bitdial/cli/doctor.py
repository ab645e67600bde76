"""`bitdial doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

import typer

from bitdial.cli import machine
from bitdial.cli.configs import command
from bitdial.cli.terminal import Terminal, size_name

PYTHON = (3, 10)
REQUIRED = ("numpy", "safetensors", "pydantic", "typer", "rich")
# distribution -> (module, what it is for, how to get it)
OPTIONAL = {
    "torch": ("torch", "quantizing, and the reference engine", "pip install 'bitdial[quantize]'"),
    "pillow": ("PIL", "reading pictures", "pip install 'bitdial[quantize]'"),
    "matplotlib": ("matplotlib", "the charts of reports", "pip install 'bitdial[report]'"),
    "scikit-learn": ("sklearn", "the digits of the demo", "pip install 'bitdial[demo]'"),
    "fastapi": ("fastapi", "bitdial serve", "pip install 'bitdial[serve]'"),
    "uvicorn": ("uvicorn", "bitdial serve", "pip install 'bitdial[serve]'"),
    "httptools": ("httptools", "bitdial serve and bitdial loadtest", "pip install 'bitdial[serve]'"),
    "prometheus-client": ("prometheus_client", "metrics of bitdial serve", "pip install 'bitdial[serve]'"),
    "ray": ("ray", "bitdial deploy", "pip install 'bitdial[ray]'"),
    "onnx": ("onnx", "bitdial export-onnx, and reading ONNX files", "pip install 'bitdial[onnx]'"),
    "onnxruntime": ("onnxruntime", "checking what export-onnx wrote", "pip install 'bitdial[onnx]'"),
    "cuda-bindings": ("cuda.bindings", "the engine on NVIDIA GPUs", "pip install 'bitdial[cuda]'"),
    "torchvision": ("torchvision", "models and data named torchvision:NAME", "pip install --no-deps torchvision"),
    "timm": ("timm", "models named timm:NAME", "pip install --no-deps timm"),
}


@command
def doctor(*, terminal: Terminal) -> None:
    """Say what this machine can do and what is missing.

    Exit code 0 unless something that bitdial always needs is missing; torch is not among it.
    """
    found = examine()
    terminal.emit(found)
    _print(terminal, found)
    if found["missing_required"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """JSON-able: Python, packages, processor, memory, torch, engines (the compiled one in detail), and a list of what required
    is missing.
    """
    required = {name: _version(name, name) for name in REQUIRED}
    missing = [f"{name}: pip install {name}" for name, version in required.items() if version is None]
    if sys.version_info < PYTHON:
        missing.insert(0, f"Python {PYTHON[0]}.{PYTHON[1]} or newer")
    return {
        "bitdial": _own_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": {
            "model": machine.cpu_model(),
            "usable_cores": machine.usable_cores(),
            "instruction_sets": machine.instruction_sets(),
        },
        "memory": machine.memory(),
        "packages": required,
        "optional_packages": {
            name: {"version": _version(name, module), "used_for": purpose, "install": remedy}
            for name, (module, purpose, remedy) in OPTIONAL.items()
        },
        "torch": _torch(),
        "engines": _engines(),
        "engine_notes": _engine_notes(),
        "cpu_engine": _cpu_engine(),
        "missing_required": missing,
    }


def _own_version() -> str:
    from bitdial._version import __version__

    return __version__


def _version(distribution: str, module: str) -> str | None:
    """Version of an installed package, None if its module is not to be found."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(distribution)
    except (ImportError, ValueError):  # PackageNotFoundError is an ImportError: found, but not installed by pip
        return "unknown" if module in sys.modules else None


def _torch() -> dict[str, Any] | None:
    """What torch says of itself, {"error": text} if it does not import, None if it is not installed."""
    if _version("torch", "torch") is None:
        return None
    try:
        import torch

        from bitdial.engines.reference.fast_conv import int8_convolutions

        return {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "int8_convolutions": int8_convolutions(),
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
    except (ImportError, OSError, RuntimeError) as error:  # a broken installation: say so, the rest still holds
        return {"error": f"{type(error).__name__}: {error}"}


def _engines() -> dict[str, str]:
    """Engine name -> "" if it can be used here, else what is missing."""
    try:
        from bitdial.engines.base import available_engines
    except ImportError as error:  # numpy is missing
        return {"reference": f"{error}"}
    return available_engines()


def _engine_notes() -> dict[str, str]:
    """Engine name -> what users should know of it, where there is something to know."""
    try:
        from bitdial.engines.base import engine_specs
    except ImportError:  # numpy is missing
        return {}
    return {name: spec.note for name, spec in engine_specs().items() if spec.note}


def _cpu_engine() -> dict[str, Any]:
    """JSON-able: is the CPU engine compiled in, what can it run here, what does it choose and who says so.

    missing          "" or what is missing and how to get it
    built_from       version of bitdial that the extension was compiled from; None where it is missing
    instruction_sets those that this processor runs and kernels exist for, best first
    chosen           the set in use, None if `problem` says why none is
    forced_by        value of BITDIAL_CPU_ISA, None where it is not set
    note             "" or what to know of the kernels that run here
    cache            folder where kernel choices are remembered
    """
    try:
        from bitdial.engines.cpu import native
        from bitdial.errors import EngineError
        from bitdial.files import cache_folder
    except ImportError as error:  # numpy is missing
        return {"missing": str(error)}
    found: dict[str, Any] = {
        "missing": native.missing(),
        "built_from": None,
        "note": native.note(),
        "instruction_sets": [],
        "chosen": None,
        "forced_by": os.environ.get(native.ISA_VARIABLE) or None,
        "problem": "",
        "cache": str(cache_folder()),
    }
    if found["missing"]:
        return found
    found["built_from"] = native.extension().version()
    found["instruction_sets"] = native.isas()
    try:
        found["chosen"] = native.choose_isa()
    except EngineError as error:
        found["problem"] = str(error)
    return found


def _print(terminal: Terminal, found: dict[str, Any]) -> None:
    terminal.say(f"bitdial {found['bitdial']}, Python {found['python']}, {found['system']}")
    cpu, store = found["cpu"], found["memory"]
    has = [name for name, there in cpu["instruction_sets"].items() if there]
    lacks = [name for name, there in cpu["instruction_sets"].items() if not there]
    terminal.say(f"processor: {cpu['model']}, {cpu['usable_cores']} cores usable")
    terminal.say(
        f"  instruction sets: {', '.join(has) or 'none of those that matter'}; without {', '.join(lacks) or 'none'}"
    )
    if store["total_bytes"] is not None:
        free = f", {size_name(store['available_bytes'])} available" if store["available_bytes"] is not None else ""
        bound = store["container_limit_bytes"]
        limit = f"; this container may use {size_name(bound)}" if bound is not None else ""
        terminal.say(f"memory: {size_name(store['total_bytes'])}{free}{limit}")
    terminal.say()
    rows = [[name, version or "missing", "always", "" if version else f"pip install {name}"]
            for name, version in found["packages"].items()]  # fmt: skip
    for name, entry in found["optional_packages"].items():
        version = entry["version"]
        rows.append([name, version or "not installed", entry["used_for"], "" if version else entry["install"]])
    terminal.table(["package", "version", "needed for", "to get it"], rows, left=4)
    _print_torch(terminal, found["torch"])
    for name, lack in found["engines"].items():
        problem = found["cpu_engine"].get("problem") if name == "cpu" else ""
        note = found["engine_notes"].get(name, "")
        terminal.say(f"engine {name}: {lack or problem or 'can be used'}{f' ({note})' if note else ''}")
    _print_cpu_engine(terminal, found["cpu_engine"], found["bitdial"])
    for text in found["missing_required"]:
        terminal.say(f"missing, and required: {text}")
    if not found["missing_required"]:
        terminal.say("nothing required is missing")


def _print_cpu_engine(terminal: Terminal, engine: dict[str, Any], version: str) -> None:
    if engine["missing"]:
        terminal.say(
            "  pip keeps a wheel built without a compiler: pip install --force-reinstall --no-cache-dir bitdial"
        )
        return
    if engine["problem"]:
        terminal.say(f"  set BITDIAL_CPU_ISA to one of {', '.join(engine['instruction_sets'])}, or unset it")
    else:
        forced = engine["forced_by"]
        why = "the best that runs here" if forced is None else f"BITDIAL_CPU_ISA={forced}"
        terminal.say(f"  uses {engine['chosen']} ({why}); this processor runs {', '.join(engine['instruction_sets'])}")
    if engine["note"]:
        terminal.say(f"  {engine['note']}")
    if engine["built_from"] != version:
        terminal.say(f"  compiled from bitdial {engine['built_from']}, not {version}: install bitdial again")
    terminal.say(f"  remembers its choice of kernels in {engine['cache']}")


def _print_torch(terminal: Terminal, torch: dict[str, Any] | None) -> None:
    if torch is None:
        terminal.say("torch: not installed; models run on the cpu engine; they cannot be quantized or evaluated")
    elif "error" in torch:
        terminal.say(f"torch: installed, but it does not import ({torch['error']})")
    else:
        fast = "used" if torch["int8_convolutions"] else "not to be had or not exact here; it uses float32 instead"
        terminal.say(f"torch {torch['version']}, {torch['threads']} threads")
        terminal.say(f"  8-bit convolutions of torch for the search: {fast}")
        terminal.say(f"  CUDA devices: {', '.join(torch['cuda_devices']) or 'none'}")
