"""Which machine a figure was measured on: processor, a short kind for file names, cores, torch and its threads."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from bitdial.processor import usable_cores

# Flags of /proc/cpuinfo that 8-bit arithmetic depends on.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")

# Intel family 6 by model number.
_INTEL = {
    63: "haswell", 79: "broadwell", 106: "ice-lake", 108: "ice-lake", 125: "ice-lake", 126: "ice-lake",
    140: "tiger-lake", 141: "tiger-lake", 143: "sapphire-rapids", 151: "alder-lake", 154: "alder-lake",
    170: "meteor-lake", 173: "granite-rapids", 174: "granite-rapids", 175: "sierra-forest", 183: "raptor-lake",
    186: "raptor-lake", 191: "raptor-lake", 207: "emerald-rapids",
}  # fmt: skip


def cpu_fields(text: str) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
        elif fields:
            break
    return fields


def machine_kind(fields: dict[str, str]) -> str:
    """A short name of the processor's generation, for file names: "amd-zen4", "intel-sapphire-rapids", ...

    From vendor, family and model number. Where these are not known here, the vendor and the widest 8-bit instructions.
    """
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    family, model = _number(fields.get("cpu family")), _number(fields.get("model"))
    vendor = fields.get("vendor_id", "")
    if vendor == "AuthenticAMD":
        generation = _amd(family, model)
        return f"amd-{generation}" if generation else f"amd-{_instructions(flags)}"
    if vendor == "GenuineIntel":
        generation = _intel(family, model, flags)
        return f"intel-{generation}" if generation else f"intel-{_instructions(flags)}"
    if "CPU implementer" in fields:
        return "arm-i8mm" if "i8mm" in flags else "arm-dotprod" if "asimddp" in flags else "arm"
    return (platform.machine() or "unknown").lower().replace("_", "-")


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else -1


def _amd(family: int, model: int) -> str:
    if family == 23:
        return "zen2" if model >= 0x30 else "zen"
    if family == 25:
        return "zen4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF else "zen3"
    return "zen5" if family == 26 else ""


def _intel(family: int, model: int, flags: set[str]) -> str:
    if family != 6:
        return ""
    if model == 85:  # three generations share this number
        return "cooper-lake" if "avx512_bf16" in flags else "cascade-lake" if "avx512_vnni" in flags else "skylake"
    return _INTEL.get(model, "")


def _instructions(flags: set[str]) -> str:
    for flag, name in (
        ("amx_int8", "amx"), ("avx512_vnni", "avx512-vnni"), ("avx_vnni", "avx-vnni"), ("avx512f", "avx512"),
        ("avx2", "avx2"),
    ):  # fmt: skip
        if flag in flags:
            return name
    return "sse"


def describe_machine(cpuinfo: str | None = None) -> dict[str, Any]:
    """JSON-able: cpu, kind, family, model, features, cores (that this process may use), torch, threads, python, system.

    cpuinfo: text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    fields = cpu_fields(cpuinfo)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        "kind": machine_kind(fields),
        "family": _number(fields.get("cpu family")),
        "model": _number(fields.get("model")),
        "features": [name for name in FEATURES if name in flags],
        "cores": usable_cores(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def reset_peak_memory() -> bool:
    """Let the kernel count this process's peak of resident memory anew (Linux); False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_memory() -> dict[str, int]:
    """{"now", "peak"}: resident bytes of this process, the peak since the last reset (or since its start)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        return {"now": 0, "peak": peak}
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {"now": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}
