"""What the CPU engine runs where: kernels per layer and ratio, why others are not used, bytes of weights and arenas."""

from __future__ import annotations

from typing import Any

from bitdial.engines.cpu import native
from bitdial.engines.cpu.loaded import Loaded
from bitdial.engines.describe import describe_program

WEIGHT_FORMS = ("8-bit", "read back", "fip", "winograd", "winograd_fip", "narrow", "stored low")


def describe(engine: Loaded) -> dict[str, Any]:
    """JSON-able; see `CpuEngine.describe`."""
    result = describe_program(engine.program)
    methods = list(native.extension().METHODS)
    compiled = set(engine.compiled_layers())
    kernels = _fixed_kernels(engine)
    totals = dict.fromkeys(WEIGHT_FORMS, 0)
    for layer in result["layers"]:
        name = layer["name"]
        if name not in compiled:
            layer["kernel"] = kernels.get(name, "reference engine")
            continue
        layer["kernels"] = [methods[engine.native.choice(name, i)[0]] for i in range(len(engine.program.ratios))]
        layer["chunks"] = [engine.native.choice(name, i)[1] for i in range(len(engine.program.ratios))]
        layer["unsupported"] = {m: why for m, why in zip(methods, engine.native.methods(name), strict=True) if why}
        layer["weight_bytes"] = dict(zip(WEIGHT_FORMS, engine.native.weight_bytes(name), strict=True))
        for form, size in layer["weight_bytes"].items():
            totals[form] += size
    result["engine"] = {
        "name": "cpu",
        "cpu": native.cpu_name(),
        "isa": engine.isa,
        "threads": engine.threads,
        "kernels": engine.kernels,
        "kernel_choice": engine.choice_source,
        "memory": engine.memory,
        "arithmetic": "int32 accumulators, bit for bit those of the reference engine",
        "weight_bytes": totals,
        "arena_bytes": {str(n): int(engine.native.arena_bytes(n)) for n in sorted({1, engine.batch_hint})},
        "reference_engine": dict(engine.compiled.reasons),
    }
    return result


def _fixed_kernels(engine: Loaded) -> dict[str, str]:
    """Layer -> kernel, of those that have one only: depthwise convolutions and products of two activations."""
    found = {name: kind for name, kind in engine.native.steps() if kind in ("depthwise", "matmul", "attention")}
    for name, layers in engine.compiled.parts.items():
        found.update(dict.fromkeys(layers, found[name]))
    return found


def layer_table(engine: Loaded, batch: int = 1, repeats: int = 15) -> list[dict[str, Any]]:
    """Per layer and ratio: kernel, milliseconds of the layer in place, GMAC/s, share of the measured peak.

    Attention is one row, that of its second product. GMAC/s counts the network's multiply-accumulates, so that a fast algorithm
    may exceed the peak. Empty where the program has steps outside the compiled ones.
    """
    if not engine.can_profile:
        return []
    methods = list(native.extension().METHODS)
    peak = native.peak(engine.isa, engine.threads)["gmacs_per_s"]
    arrays = engine.profile_arrays(batch)
    place = {name: i for i, (name, _) in enumerate(engine.native.steps())}
    times = [engine.native.profile(arrays, batch, i, repeats) for i in range(len(engine.program.ratios))]
    compiled, fixed, rows = set(engine.compiled_layers()), _fixed_kernels(engine), []
    parts = engine.compiled.parts
    for name in engine.program.layers:
        if name not in place:
            continue
        seconds = [t[place[name]] for t in times]
        macs = sum(engine.program.layers[part].macs for part in parts.get(name, [name]))
        speeds = [macs * batch / s / 1e9 if s > 0 else 0.0 for s in seconds]
        kernels = [fixed.get(name, "")] * len(times)
        if name in compiled:
            kernels = [methods[engine.native.choice(name, i)[0]] for i in range(len(times))]
        rows.append(
            {
                "layer": name,
                "source": engine.program.instruction(name).source,
                "kernels": kernels,
                "milliseconds": [1e3 * s for s in seconds],
                "gmacs_per_s": speeds,
                "of_peak": [s / peak for s in speeds],
            }
        )
    return rows
