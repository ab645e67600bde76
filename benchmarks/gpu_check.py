"""The CUDA engine on a GPU: whole networks equal to the exact engines at every ratio, then latency, the cost of a switch, what
each layer takes, and other libraries beside (gpu_peers.py).

    python benchmarks/gpu_check.py --prepare          # anywhere: artifacts and expected outputs, minutes to an hour
    python benchmarks/gpu_check.py                    # on a GPU: under 6 minutes; `--seconds` bounds it

    python benchmarks/gpu_check.py --emulated         # anywhere: equality alone, the kernels' sources under the emulator

Without a GPU it says so and ends with status 0. Times are of the whole call from NumPy to NumPy, and of the device alone (runs
one behind the other, without transfers); switch: the median of a call whose ratio differs from the one before, less that of
equal ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gpu_peers
from bitdial.artifact import load_program
from bitdial.engines.base import create_engine, default_engine
from bitdial.engines.cuda import compilation, driver
from bitdial.engines.cuda.emulated import EmulatedDevice, build
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.errors import DataError
from bitdial.quantization.program import Program
from common import RESULTS, ROOT, Progress, note, print_table, run_command

NETWORKS = "resnet18,resnet50,vit_s,vit_b,minilm_l6_48,resnet20,vgg"  # the last two with trained weights
SHOWN = 12  # layers of a network
CHECKED = 3  # samples whose outputs are compared
Array = npt.NDArray[Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--batches", default="1,16", help="batch sizes (default: %(default)s)")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="nothing is begun after these (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of a measurement (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="leave out other libraries")
    parser.add_argument("--samples", type=int, default=1, help="compared under the emulator (default: %(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make artifacts and expected outputs; needs no GPU")
    parser.add_argument("--architectures", default="sm_80,sm_86,sm_90", help="to compile kernels for when preparing")
    parser.add_argument("--emulated", action="store_true", help="compare on the host, with and without 4-bit products")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache", help="folder of what is prepared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    networks = options.networks.split(",")
    os.environ.setdefault("BITDIAL_CACHE_DIR", str(options.cache))  # machine code made here serves where NVRTC is missing
    if options.prepare:
        for architecture in () if compilation.compiler_missing() else options.architectures.split(","):
            compilation.compile_kernels(architecture)
        for network in networks:
            try:
                prepare(network, options.cache)
            except DataError as problem:
                note(f"{network}: left out: {problem}")
        return
    if options.emulated:
        emulated(networks, options.cache, options.results, options.samples)
        return
    missing = driver.missing()
    if missing:
        note(f"SKIPPED: THE CUDA ENGINE WAS NOT RUN: {missing}")
        return
    on_gpu(networks, options)


class Budget:
    """Seconds of the whole run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def on_gpu(networks: Sequence[str], options: argparse.Namespace) -> None:
    """Equality of every network first, then times, then times of layers, then peers, as far as the budget goes."""
    budget, found = Budget(options.seconds), dict[str, Any]()
    batches = [int(b) for b in options.batches.split(",")]
    device: dict[str, Any] = {}
    engines: dict[str, tuple[CudaEngine, list[Array]]] = {}
    for network in networks:
        files = prepared(network, options.cache)
        if budget.left() <= 0 or not all(f.exists() for f in files):
            note(f"{network}: left out: {'not prepared (--prepare)' if not all(f.exists() for f in files) else 'out of time'}")
            continue
        program, inputs, expected = load(files)
        engine = CudaEngine(program, gpu=options.gpu)
        device = {k: v for k, v in engine.describe()["engine"].items() if k in ("device", "architecture", "low_products")}
        differing = unequal(engine, inputs, expected)
        note(f"{network}: {'EQUAL at all ratios' if not differing else f'DIFFERS at ratios {differing}'}")
        found[network] = {"differing": differing, "rows": [], "layers": []}
        if not differing:
            engines[network] = engine, inputs
    for network, (engine, inputs) in engines.items():
        for batch in batches:
            if budget.left() > 0:
                found[network]["rows"] += measure(engine, inputs, [batch], options.repeats)
    for network, (engine, _) in engines.items():
        if budget.left() > 0:
            found[network]["layers"] = layers(engine, batches[-1])
    tasks = [] if options.no_peers else [
        gpu_peers.Task(network, [batch_of([x], batches[-1]) for x in inputs], options.cache)
        for network, (_, inputs) in engines.items()
    ]  # fmt: skip
    peers = gpu_peers.compare(tasks, budget.left)
    show(found, peers, device)
    if found:
        content = {"benchmark": "gpu_check", "device": device, "networks": found, "peers": peers}
        path = options.results / f"gpu_check.{str(device['device']).lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    if any(v["differing"] for v in found.values()):
        raise SystemExit(1)


def show(found: dict[str, Any], peers: Sequence[dict[str, Any]], device: dict[str, Any]) -> None:
    title = ", ".join(map(str, device.values()))
    said = {network: "equal" if not v["differing"] else "DIFFERS" for network, v in found.items()}
    rows = [[network, said[network], *texts(r)] for network, v in found.items() for r in v["rows"] or [{}]]
    print_table("CUDA engine", ["network", "outputs", "batch", "ratio", "call ms", "device ms", "switch ms"], rows, title)
    rows = [
        [network, r["layer"], r["kernel"], f"{r['first_ms']:.4f}", f"{r['last_ms']:.4f}", f"{r['first_ms'] / r['last_ms']:.2f}"]
        for network, v in found.items() for r in sorted(v["layers"], key=lambda r: -r["first_ms"])[:SHOWN]
    ]  # fmt: skip
    columns = ["network", "layer", "kernel", "ms at the lowest ratio", "ms at the highest", "gain"]
    print_table(f"The {SHOWN} longest layers, alone on the device", columns, rows, title)
    rows = [[p["peer"], p["network"], str(p["batch"]), f"{p['ms']:.3f}" if "ms" in p else p["skipped"]] for p in peers]
    print_table("Others on the same device", ["library", "network", "batch", "device ms, or why it is left out"], rows, title)


def layers(engine: CudaEngine, batch: int) -> list[dict[str, Any]]:
    """Milliseconds of every instruction's launches, at the first and the last ratio."""
    rows: dict[str, dict[str, Any]] = {}
    for key, ratio in (("first_ms", engine.ratios[0]), ("last_ms", engine.ratios[-1])):
        for name, kernel, seconds in engine.seconds_per_step(batch, ratio):
            layer = name.split(":")[0].split("/")[0]  # of what is done for it: parts, orders, lowering
            row = rows.setdefault(layer, {"layer": layer, "kernel": kernel, "first_ms": 0.0, "last_ms": 0.0})
            row["kernel"] = kernel  # the last one
            row[key] += 1e3 * seconds
    return list(rows.values())


def emulated(networks: Sequence[str], cache: Path, results: Path, samples: int) -> None:
    """Compare prepared networks on both emulated devices; every access is checked for bounds and races. No times."""
    rows, found = list[list[str]](), dict[str, Any]()
    for network in networks:
        files = prepared(network, cache)
        if not all(f.exists() for f in files):
            note(f"{network}: left out: not prepared (--prepare)")
            continue
        program, inputs, expected = load(files)
        for native in (True, False):
            device = EmulatedDevice(build(ROOT / "build" / "emulation", native), native, memory=64 << 30)
            engine = CudaEngine(program, device=device)
            differing = unequal(engine, inputs, [want[:samples] for want in expected])
            kind = "native 4-bit products" if native else "unpacked"
            row = {"differing": differing, "ratios": program.ratios, "launches": len(device.launches), "samples": samples}
            found[f"{network}, {kind}"] = row
            rows.append([network, kind, "equal" if not differing else f"DIFFERS at {differing}", str(len(program.ratios)),
                         str(len(device.launches))])  # fmt: skip
            note(": ".join(rows[-1][:3]))
    columns = ["network", "device", "outputs", "ratios", "launches"]
    print_table("CUDA engine, emulated", columns, rows, "kernels compiled for the host; no GPU was used")
    if found:
        content = {"benchmark": "gpu_check", "device": "emulated on the host", "networks": found}
        (results / "gpu_check.emulated.json").write_text(json.dumps(content, indent=1) + "\n")
    if any(v["differing"] for v in found.values()):
        raise SystemExit(1)


def load(files: tuple[Path, Path]) -> tuple[Program, list[Array], list[Array]]:
    """(program, samples of every input, expected outputs per ratio)."""
    program = load_program(files[0])
    with np.load(files[1]) as stored:
        inputs = [stored[f"x{i}"] for i in range(len(program.inputs))]
        return program, inputs, [stored[f"ratio{i}"] for i in range(len(program.ratios))]


def prepared(network: str, cache: Path) -> tuple[Path, Path]:
    """(artifact, expected outputs)."""
    return cache / f"gpu_check.{network}.bitdial", cache / f"gpu_check.{network}.npz"


def prepare(network: str, cache: Path) -> None:
    """Make both, where they are not there: for target "cuda", the outputs by the CPU engine, or the reference engine where that
    is missing: they give the same bits."""
    from common import data_folder
    from peers.networks import NETWORKS, build_artifact, input_batch

    progress = Progress(network)
    artifact, outputs = prepared(network, cache)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n", encoding="ascii")  # nothing of a cache belongs to the project
    if not artifact.exists():
        build_artifact(network, artifact, data_folder() if NETWORKS[network].weights else None, progress, "cuda")
    program = load_program(artifact)
    if not gpu_peers.missing("onnx", "onnxruntime"):
        gpu_peers.prepare_int8(network, cache, None)
    save_outputs(outputs, program, input_batch(network, CHECKED))
    progress.done("prepared")


def save_outputs(path: Path, program: Program, inputs: Sequence[Array]) -> None:
    """Inputs, and the first output at every ratio, from an engine that defines results."""
    engine = create_engine(program, default_engine(program))
    expected = {f"ratio{i}": first(engine.run(batch_of(inputs), ratio)) for i, ratio in enumerate(program.ratios)}
    np.savez(path, **{f"x{i}": x for i, x in enumerate(inputs)}, **expected)  # type: ignore[arg-type]


def batch_of(inputs: Sequence[Array], n: int | None = None) -> Any:
    """What an engine takes: n samples, cut or repeated; None: as they are."""
    sized = [x if n is None else np.resize(x, (n, *x.shape[1:])) for x in inputs]
    return sized[0] if len(sized) == 1 else sized


def first(result: Any) -> Array:
    return np.asarray(result[0] if isinstance(result, tuple) else result)


def unequal(engine: CudaEngine, inputs: Sequence[Array], expected: Sequence[Array]) -> list[float]:
    """The ratios at which outputs differ in a bit (but for the sign of zero), alone or in a batch."""
    found = []
    for ratio, want in zip(engine.ratios, expected, strict=True):
        equal = np.array_equal(first(engine.run(batch_of(inputs, len(want)), ratio)), want)
        if not equal or (len(want) > 1 and not np.array_equal(first(engine.run(batch_of(inputs, 1), ratio)), want[:1])):
            found.append(ratio)
    return found


def measure(engine: CudaEngine, inputs: Sequence[Array], batches: Sequence[int], repeats: int = 15) -> list[dict[str, float]]:
    """Milliseconds per batch size and ratio."""
    rows = []
    for batch in batches:
        data = batch_of(inputs, batch)
        ratios = sorted({engine.ratios[0], engine.ratios[len(engine.ratios) // 2], engine.ratios[-1]})
        for ratio in ratios:
            other = ratios[0] if ratio != ratios[0] else ratios[-1]
            engine.run(data, other)
            engine.run(data, ratio)
            same = statistics.median(_milliseconds(engine, data, ratio) for _ in range(repeats))
            turned = []
            for _ in range(repeats):
                engine.run(data, other)
                turned.append(_milliseconds(engine, data, ratio))
            rows.append({
                "batch": batch, "ratio": ratio, "call_ms": same, "switch_ms": statistics.median(turned) - same,
                "device_ms": 1e3 * engine.seconds_per_run(batch, ratio, repeats),
            })  # fmt: skip
    return rows


def _milliseconds(engine: CudaEngine, data: Any, ratio: float) -> float:
    begin = time.perf_counter()
    engine.run(data, ratio)
    return 1e3 * (time.perf_counter() - begin)


def texts(row: dict[str, float]) -> list[str]:
    if not row:
        return [""] * 5
    return [f"{row['batch']:.0f}", f"{row['ratio']:.2f}", *(f"{row[k]:.3f}" for k in ("call_ms", "device_ms", "switch_ms"))]


if __name__ == "__main__":
    run_command(main)
