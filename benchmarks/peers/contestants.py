"""Who takes part: which libraries are there, which files and settings each contestant gets, and what proves int8."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdial.engines.base import available_engines
from peers.models import ModelFiles


@dataclass(frozen=True)
class Contestant:
    """One process.

    name       as in tables
    adapter    module of `peers` that runs it
    needs      modules that must be importable
    precision  "float32" | "bfloat16" | "int8" (bitdial: "int8", its ratio 0)
    source     which file of `ModelFiles` it loads, "" for none
    settings   further arguments of its `load`
    """

    name: str
    adapter: str
    needs: tuple[str, ...]
    precision: str
    source: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]

    def missing(self) -> str:
        """What keeps it from running here, "" if nothing."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        if dict(self.settings).get("compiled") and not (shutil.which("g++") or shutil.which("clang++")):
            return "no C++ compiler for torch.compile"
        return ""

    def load_settings(self, files: ModelFiles, network: str, inputs: Path, threads: int) -> dict[str, Any]:
        """Arguments of the worker's `load`; makes the files that are needed."""
        settings: dict[str, Any] = {"inputs": str(inputs), "threads": threads, **dict(self.settings)}
        if self.source:
            settings["model"] = str(getattr(files, self.source)(network))
        else:
            settings |= {"network": network, "data": None if files.data is None else str(files.data)}
        return settings


def _torch(precision: str, compiled: bool) -> Contestant:
    name = f"torch/{precision}{' compiled' if compiled else ''}"
    return Contestant(name, "torch_peer", ("torch",), precision, "", (("precision", precision), ("compiled", compiled)))


PEERS: tuple[Contestant, ...] = (
    _torch("float32", False),
    _torch("bfloat16", False),
    _torch("float32", True),
    _torch("bfloat16", True),
    Contestant("onnxruntime/float32", "onnxruntime_peer", ("onnxruntime", "onnx"), "float32", "onnx"),
    Contestant("onnxruntime/int8", "onnxruntime_peer", ("onnxruntime", "onnx"), "int8", "onnx_int8"),
    Contestant("openvino/float32", "openvino_peer", ("openvino", "onnx"), "float32", "onnx", (("precision", "f32"),)),
    Contestant("openvino/bfloat16", "openvino_peer", ("openvino", "onnx"), "bfloat16", "onnx", (("precision", "bf16"),)),
    Contestant(
        "openvino/int8 QDQ", "openvino_peer", ("openvino", "onnxruntime", "onnx"), "int8", "onnx_int8",
        (("precision", "f32"),),
    ),
    Contestant(
        "openvino/int8 NNCF", "openvino_peer", ("openvino", "nncf", "onnx"), "int8", "openvino_int8",
        (("precision", "f32"),),
    ),
)  # fmt: skip


def bitdial_contestant(isa: str | None, engine: str = "cpu", **options: Any) -> Contestant:
    """isa None: for engines without one."""
    settings = (("engine", engine), ("isa", isa), ("options", options))
    return Contestant(f"bitdial/{isa or engine}", "bitdial_peer", (), "int8", "artifact", settings)


def available_isas(engine: str) -> list[str | None]:
    """Instruction sets that bitdial's engine can be forced to here, best first; [None] for an engine without any; [] if
    the engine cannot run."""
    if available_engines().get(engine, "unknown") != "":
        return []
    if engine != "cpu":
        return [None]
    native = importlib.import_module("bitdial.engines.cpu.native")
    return list(native.isas())


def measured_peak(isa: str, threads: int) -> dict[str, float] | None:
    """{"gmacs_per_s", "bandwidth_gb_per_s"} of this machine as bitdial's own engine measures it; None without it."""
    try:
        native = importlib.import_module("bitdial.engines.cpu.native")
        return dict(native.peak(isa, threads))
    except (ImportError, AttributeError):
        return None


def extension_digest() -> str:
    """16 hex digits over the compiled engine, "" where there is none."""
    from common import file_digest

    found = importlib.util.find_spec("bitdial.engines.cpu")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    binaries = [] if folder is None else sorted(folder.glob("*.so"))
    try:
        native = importlib.import_module("bitdial.engines.cpu._native")
        binaries = [Path(native.__file__)] if native.__file__ else binaries
    except (ImportError, AttributeError):
        pass
    return file_digest(binaries[0]) if binaries else ""


def versions(contestants: Sequence[Contestant]) -> dict[str, str]:
    """Version of every library that takes part."""
    names = sorted({module for c in contestants for module in c.needs} | {"numpy"})
    return {name: importlib.metadata.version(name) for name in names}


def low_precision_share(contestant: Contestant, info: dict[str, Any]) -> tuple[int, int] | None:
    """(layers that run in the contestant's precision, layers) from what its library says it runs; None if it does not
    say. torch says nothing of precision per layer."""
    if contestant.library == "onnxruntime":
        counts: dict[str, int] = info.get("operators", {})
        total = sum(counts.values())
        quantized = sum(
            n for name, n in counts.items() if name.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger"))
        )
        return (quantized if contestant.precision == "int8" else total - quantized), total
    if contestant.library == "openvino":
        counts = info.get("primitives", {})
        wanted = {"int8": ("u8", "i8"), "bfloat16": ("bf16",), "float32": ("f32",)}[contestant.precision]
        return sum(n for name, n in counts.items() if name.split()[1] in wanted), sum(counts.values())
    return None
