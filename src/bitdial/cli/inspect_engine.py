"""The part of `bitdial inspect` that shows a model in an engine: in the CPU engine kernels, speed, bytes, and what hinders faster
ones; on the NPU modelled cycles, use of the array, traffic and energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitdial.cli.configs import Given
from bitdial.cli.options import npu_options
from bitdial.cli.terminal import Terminal, ratio_name, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.quantization.program import Program

ENGINE, NPU = "cpu", "npu"
REPEATS = 15
MOST_NAMES = 6  # layers named per reason; the JSON has all

Row = Mapping[str, Any]


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says of the engine; None: the default. name None: no engine was asked for."""

    name: str | None
    isa: str | None
    threads: int | None
    batch: int | None
    kernels: str | None
    memory: str | None
    npu: Given = field(default_factory=Given)

    def check(self) -> None:
        """Raise ConfigError for another engine, or for options of an engine that was not asked for."""
        given = {"--isa": self.isa, "--threads": self.threads, "--batch": self.batch, "--kernels": self.kernels,
                 "--memory": self.memory}  # fmt: skip
        named = [option for option, value in given.items() if value is not None]
        if self.name is None and (named or self.npu):
            asked = [*named, *self.npu.flags]
            raise ConfigError(f"{', '.join(asked)}: belongs to an engine; add --engine {ENGINE if named else NPU}")
        if self.name not in (None, ENGINE, NPU):
            raise ConfigError(
                f"--engine: inspect shows the '{ENGINE}' engine, which chooses kernels, and the '{NPU}' engine, which models an "
                f"array; not '{self.name}'"
            )
        if self.name == NPU and named:
            raise ConfigError(f"{', '.join(named)}: belongs to the '{ENGINE}' engine")
        if self.name == ENGINE and self.npu:
            raise ConfigError(f"{', '.join(self.npu.flags)}: belongs to the '{NPU}' engine")

    def for_engine(self) -> dict[str, Any]:
        """Options of `create_engine`. Raises ConfigError."""
        if self.name == NPU:
            return npu_options(self.npu, NPU)
        given = {"isa": self.isa, "threads": self.threads, "batch_hint": self.batch, "kernels": self.kernels,
                 "memory": self.memory}  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def examine_engine(program: Program, options: EngineOptions) -> dict[str, Any]:
    """JSON-able: what the engine makes of the program, and the speed of every layer in place on this machine.

    "description": the engine's own; "peak": measured, "gmacs_per_s" and "bandwidth_gb_per_s"; "layers": kernel,
    milliseconds, GMAC/s and share of the peak per layer and ratio, empty where a part of the program runs elsewhere.
    On the NPU "description" alone, with cycles, utilisation, traffic and energy per layer and ratio.
    Raises EngineError.
    """
    from bitdial.engines.base import create_engine

    if options.name == NPU:
        return {"description": create_engine(program, NPU, **options.for_engine()).describe()}
    from bitdial.engines.cpu import native
    from bitdial.engines.cpu.engine import CpuEngine

    engine = create_engine(program, ENGINE, **options.for_engine())
    assert isinstance(engine, CpuEngine)
    batch = options.batch or 1
    return {
        "batch": batch,
        "peak": native.peak(engine.isa, engine.threads),
        "description": engine.describe(),
        "layers": engine.layer_table(batch, REPEATS),
    }


def print_engine(terminal: Terminal, found: Mapping[str, Any]) -> None:
    """Machine and choice, a table of layers, why faster kernels are not used, bytes, what runs elsewhere."""
    described = found["description"]
    if described["engine"]["name"] == NPU:
        _print_npu(terminal, described)
        return
    engine, peak = described["engine"], found["peak"]
    threads = engine["threads"]
    terminal.say()
    terminal.say(
        f"engine {engine['name']}: {engine['cpu']}, {engine['isa']}, {threads} thread{'' if threads == 1 else 's'}, "
        f"batch {found['batch']}"
    )
    terminal.say(
        f"  measured peaks: {peak['gmacs_per_s']:.1f} GMAC/s of 8-bit products in registers, "
        f"{peak['bandwidth_gb_per_s']:.1f} GB/s read from memory"
    )
    terminal.say(f"  kernels: {engine['kernels']}, {CHOICES.get(engine['kernel_choice'], engine['kernel_choice'])}")
    _print_layers(terminal, found)
    _print_unsupported(terminal, described["layers"])
    _print_bytes(terminal, engine)
    _print_elsewhere(terminal, engine, described)


def _print_npu(terminal: Terminal, described: Row) -> None:
    engine, ratios = described["engine"], described["ratios"]
    rows, columns = engine["array"]
    terminal.say()
    terminal.say(
        f"engine npu: {rows} x {columns} array at {engine['megahertz']:g} MHz, {engine['dram_bytes_per_cycle']:g} bytes a "
        f"cycle of memory, buffers of {size_name(engine['buffer_bytes'])}; time is modelled, not measured"
    )
    ends = [0] if len(ratios) == 1 else [0, len(ratios) - 1]
    heads = ["layer", "weight"]
    for i in ends:
        heads += [f"{ratio_name(ratios[i])}: cycles", "array used"]
    shown = []
    for layer in described["layers"]:
        cells = [layer["source"] or layer["name"], "x".join(map(str, layer["weight_shape"] or [])) or "-"]
        for i in ends:
            cost = layer["npu"][i] if "npu" in layer else None
            cells += ["-", "-"] if cost is None else [f"{cost['cycles']:,}", f"{100 * cost['utilisation']:.0f} %"]
        shown.append(cells)
    terminal.table(heads, shown, "one sample; cycles with memory", left=2)
    totals = [
        [ratio_name(r), f"{t['cycles']:,}", f"{1e-3 * t['cycles'] / engine['megahertz']:.4f}", f"{100 * t['utilisation']:.0f} %",
         size_name(t["dram_bytes"]), f"{1e-6 * t['picojoules']:.1f}", f"{100 * own / t['cycles']:.1f} %"]
        for r, t, own in zip(ratios, engine["totals"], engine["reorder_cycles"], strict=True)
    ]  # fmt: skip
    terminal.table(
        ["ratio", "cycles", "ms", "array used", "from and to memory", "uJ", "reorders"], totals,
        f"all layers on the array, and {len(engine['reorders'])} reorders of channels that the layout left",
    )
    if engine["host"]:
        terminal.table(["on the host", "why"], [list(item) for item in engine["host"].items()], left=2)


CHOICES = {
    "rule": "chosen by rule, without timing",
    "forced": "forced where exact, direct elsewhere",
    "timing": "chosen by timing them now",
    "cache": "chosen by timing at an earlier load",
}


def kernel_text(kernels: Sequence[str], ratios: Sequence[float]) -> str:
    """["direct", "fip", "fip"] -> "direct, fip from 50 %"."""
    parts = [kernels[0]]
    for before, kernel, ratio in zip(kernels, kernels[1:], ratios[1:], strict=False):
        if kernel != before:
            parts.append(f"{kernel} from {ratio_name(ratio)}")
    return ", ".join(parts)


def _print_layers(terminal: Terminal, found: Mapping[str, Any]) -> None:
    layers, ratios, timed = found["description"]["layers"], found["description"]["ratios"], found["layers"]
    peak = found["peak"]["gmacs_per_s"]
    ends = [0] if len(ratios) == 1 else [0, len(ratios) - 1]
    columns = ["layer", "weight", "kernel by ratio"]
    for i in ends:
        columns += [f"{ratio_name(ratios[i])}: ms", "GMAC/s", "of peak"]
    times = {row["layer"]: row for row in timed}
    rows = []
    for layer in layers:
        own = times.get(layer["name"])
        kernels = layer.get("kernels") or [layer.get("kernel", "reference engine")]
        cells = [
            layer["source"] or layer["name"],
            "x".join(map(str, layer["weight_shape"] or [])) or "-",
            kernel_text(kernels, ratios),
        ]
        for i in ends:
            if own is None:
                cells += ["-"] * 3
            else:
                of_peak = f"{100 * own['of_peak'][i]:.0f} %"
                cells += [f"{own['milliseconds'][i]:.4f}", f"{own['gmacs_per_s'][i]:.1f}", of_peak]
        rows.append(cells)
    if timed:
        macs = {layer["name"]: layer["macs"] for layer in layers}
        done = found["batch"] * sum(macs[row["layer"]] for row in timed)
        total = ["together", "", ""]
        for i in ends:
            milliseconds = sum(row["milliseconds"][i] for row in timed)
            speed = done / milliseconds / 1e6 if milliseconds > 0 else 0.0
            total += [f"{milliseconds:.4f}", f"{speed:.1f}", f"{100 * speed / peak:.0f} %"]
        rows.append(total)
    terminal.table(
        columns,
        rows,
        "layers in place, at the smallest and the largest ratio; fast algorithms may exceed the peak",
        left=3,
    )
    if not timed:
        terminal.say("layers were not timed: parts of the network run in the reference engine (named below)")


def unsupported_rows(layers: Sequence[Row]) -> list[tuple[list[str], str, list[str]]]:
    """(kernels, why they are not exact or not there, layers), one row per reason, most layers first."""
    found: dict[str, dict[str, list[str]]] = {}
    for layer in layers:
        by_reason: dict[str, list[str]] = {}
        for kernel, why in layer.get("unsupported", {}).items():
            by_reason.setdefault(why, []).append(kernel)
        for why, kernels in by_reason.items():
            found.setdefault(why, {}).setdefault(", ".join(kernels), []).append(layer["source"] or layer["name"])
    rows = [
        (kernels.split(", "), why, names) for why, by_kernels in found.items() for kernels, names in by_kernels.items()
    ]
    return sorted(rows, key=lambda row: -len(row[2]))


def _print_unsupported(terminal: Terminal, layers: Sequence[Row]) -> None:
    rows = []
    for kernels, why, names in unsupported_rows(layers):
        shown = ", ".join(names[:MOST_NAMES]) + (
            f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        )
        rows.append([", ".join(kernels), why, str(len(names)), shown])
    if rows:
        terminal.table(["not used", "because", "layers", ""], rows, "kernels that are not offered", left=4)


def _print_bytes(terminal: Terminal, engine: Row) -> None:
    forms = {form: size for form, size in engine["weight_bytes"].items() if size}
    held = ", ".join(f"{form} {size_name(size)}" for form, size in forms.items()) or "none"
    terminal.say(f"weights held: {size_name(sum(forms.values()))} ({held}); memory={engine['memory']}")
    arenas = ", ".join(f"{size_name(size)} at batch {batch}" for batch, size in engine["arena_bytes"].items())
    terminal.say(f"arena of one run: {arenas}")


def _print_elsewhere(terminal: Terminal, engine: Row, described: Row) -> None:
    reasons = engine["reference_engine"]
    if not reasons:
        terminal.say("everything is compiled; nothing runs in the reference engine")
        return
    sources = {item["name"]: item["source"] for item in (*described["layers"], *described["float_operators"])}
    rows = [[name, sources.get(name) or "-", why] for name, why in reasons.items()]
    terminal.table(["in the reference engine", "module", "why"], rows, left=3)
