"""Which kernel runs which layer at which ratio: by rule, by force, or by timing on this machine (remembered in a file).

All kernels give the same outputs; the choice is about time only. The cache lies in BITDIAL_CACHE_DIR, else in
$XDG_CACHE_HOME/bitdial, else in ~/.cache/bitdial; it holds JSON, and a file that cannot be read or written is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.engines.cpu import native as extension
from bitdial.engines.cpu.loaded import Loaded
from bitdial.errors import OutputError
from bitdial.files import cache_folder, write_atomically

FORMAT = 1
BUDGET = 6.0  # seconds that timing may take, roughly; at least two runs of every candidate are made
Choices = dict[str, list[tuple[int, int]]]  # layer -> (method, chunk) per ratio


def choose_kernels(engine: Loaded) -> str:
    """Choose kernels and pack the weights they need. Returns where the choice came from: rule, forced, timing or cache."""
    methods = list(extension.extension().METHODS)
    if engine.kernels in methods:
        _force(engine, methods.index(engine.kernels))
        source = "forced"
    elif engine.kernels == "fixed" or not engine.can_profile or not engine.compiled_layers():
        source = "rule"
    else:
        path = cache_path(engine)
        choices = read_cache(path, engine)
        source = "cache"
        if choices is None:
            choices = time_kernels(engine)
            engine.reset_counters()  # they tell what the caller ran
            write_cache(path, choices)
            source = "timing"
        _apply(engine, choices)
    engine.native.finish()
    return source


def _force(engine: Loaded, method: int) -> None:
    for layer in engine.compiled_layers():
        if engine.native.methods(layer)[method] == "":
            for index in range(len(engine.program.ratios)):
                engine.native.choose(layer, index, method, 0)


def _apply(engine: Loaded, choices: Choices) -> None:
    for layer, row in choices.items():
        for index, (method, chunk) in enumerate(row):
            engine.native.choose(layer, index, method, chunk)


# ---- timing ----------------------------------------------------------------------------------------------------------------


def candidates(engine: Loaded, layer: str, index: int) -> list[tuple[int, int]]:
    """(method, chunk) pairs worth timing for a layer at a ratio; the rule's choice first."""
    native = engine.native
    usual = native.usual(layer, index)
    result = [usual]
    if bool(engine.program.layers[layer].low[index].any()):
        exact = [m for m, why in enumerate(native.methods(layer)) if why == ""]
        for method in exact:
            native.choose(layer, index, method, 0)
            base = native.choice(layer, index)[1]
            names = extension.extension().METHODS
            sizes = (base // 2, base, base * 2) if names[method].startswith("winograd") else (base, base // 2)
            result += [(method, max(12, size // 12 * 12)) for size in sizes]
        native.choose(layer, index, *usual)
    else:
        result += [(usual[0], usual[1] // 2), (usual[0], usual[1] * 2)]
    return list(dict.fromkeys(result))


def time_kernels(engine: Loaded, budget: float = BUDGET) -> Choices:
    """Run the network with every layer's k-th candidate, k = 0, 1, ..., and keep each layer's fastest per ratio.

    Layers are timed where they stand, between their neighbours, at the engine's batch hint; the fastest of a few runs counts.
    A layer whose low groups are the same at two ratios is timed once.
    """
    native, ratios, layers = engine.native, range(len(engine.program.ratios)), engine.compiled_layers()
    place = {name: i for i, (name, _) in enumerate(native.steps())}
    rows = {(n, i): candidates(engine, n, i) for n in layers for i in ratios}
    arrays = engine.profile_arrays(engine.batch_hint)
    native.finish(all=True)
    begin = time.perf_counter()
    native.profile(arrays, engine.batch_hint, 0, 1)
    native.profile(arrays, engine.batch_hint, 0, 1)
    once = (time.perf_counter() - begin) / 2
    rounds = sum(max(len(rows[n, i]) for n in layers) for i in ratios)
    repeats = int(np.clip(budget / max(1e-6, rounds * once), 2, 9))
    best: Choices = {n: [(-1, 0)] * len(ratios) for n in layers}
    known: dict[tuple[str, bytes], tuple[int, int]] = {}
    for index in ratios:
        times: dict[str, list[tuple[float, tuple[int, int]]]] = {n: [] for n in layers}
        open_layers = [n for n in layers if (n, engine.program.layers[n].low[index].tobytes()) not in known]
        for k in range(max((len(rows[n, index]) for n in open_layers), default=0)):
            for n in open_layers:
                native.choose(n, index, *rows[n, index][min(k, len(rows[n, index]) - 1)])
            native.finish(all=True)
            runs = np.array([native.profile(arrays, engine.batch_hint, index, 1) for _ in range(repeats)]).min(axis=0)
            for n in open_layers:
                if k < len(rows[n, index]):
                    times[n].append((float(runs[place[n]]), rows[n, index][k]))
        for n in layers:
            key = (n, engine.program.layers[n].low[index].tobytes())
            if key not in known:
                known[key] = min(times[n])[1]
            best[n][index] = known[key]
    return best


# ---- cache -----------------------------------------------------------------------------------------------------------------


def _build(module: Any) -> list[int]:
    """What tells one build of the extension from another of the same version."""
    try:
        status = os.stat(module.__file__)
    except (OSError, TypeError):
        return []
    return [status.st_size, status.st_mtime_ns]


def cache_path(engine: Loaded) -> Path:
    """File of an engine's choices: everything that speed depends on is in its name's digest."""
    digest = hashlib.sha256()
    module = extension.extension()
    digest.update(
        json.dumps(
            [FORMAT, module.version(), _build(module), extension.cpu_name(), os.cpu_count(),
             engine.isa, engine.threads, engine.batch_hint, engine.memory,
             engine.program.ratios]
        ).encode()
    )  # fmt: skip
    for name in engine.compiled_layers():
        layer, step = engine.program.layers[name], engine.program.instruction(name)
        assert layer.weight is not None
        shape = [str(d) for d in engine.program.types[step.inputs[0]].shape]
        attrs = step.attributes()
        head = [name, list(layer.weight.shape), shape, attrs.get("stride"), attrs.get("padding"), layer.amax,
                layer.wmax, layer.low_weight is not None, engine.native.methods(name)]  # fmt: skip
        digest.update(json.dumps(head, default=str).encode())
        for array in (layer.low, layer.group_bounds, layer.activation_shift, layer.weight_shift):
            digest.update(np.ascontiguousarray(array).tobytes())
    return cache_folder() / "kernels" / f"{digest.hexdigest()[:32]}.json"


def read_cache(path: Path, engine: Loaded) -> Choices | None:
    """Choices of an earlier load, or None if there are none that fit."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        methods = list(extension.extension().METHODS)
        choices = {str(n): [(methods.index(m), int(c)) for m, c in row] for n, row in data["choices"].items()}
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    layers = engine.compiled_layers()
    fits = sorted(choices) == sorted(layers) and all(len(choices[n]) == len(engine.program.ratios) for n in layers)
    exact = fits and all(
        engine.native.methods(n)[method] == "" and 12 <= chunk <= 4096 for n in layers for method, chunk in choices[n]
    )
    return choices if exact else None


def write_cache(path: Path, choices: Choices) -> None:
    """Remember choices; a folder that cannot be written costs the memory, nothing else."""
    methods = list(extension.extension().METHODS)
    text = json.dumps(
        {"format": FORMAT, "choices": {n: [[methods[m], c] for m, c in row] for n, row in choices.items()}}, indent=1
    )
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
