"""The CUDA engine on a GPU: whole networks equal to the exact engines at every ratio, then latency and the cost of a switch.

    python benchmarks/gpu_check.py --prepare          # anywhere: artifacts and expected outputs, minutes to an hour
    python benchmarks/gpu_check.py                    # on a GPU: under 6 minutes; `--seconds` bounds it

Without a GPU it says so and ends with status 0. Times are of the whole call from NumPy to NumPy, and of the device alone (runs
one behind the other, without transfers); switch: the median of a call whose ratio differs from the one before, less that of
equal ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact import load_program
from bitdial.engines.base import create_engine, default_engine
from bitdial.engines.cuda import driver
from bitdial.engines.cuda.engine import CudaEngine
from bitdial.quantization.program import Program
from common import RESULTS, ROOT, Progress, note, print_table, run_command

NETWORKS = "resnet18,resnet50,vit_s,vit_b"
CHECKED = 3  # samples whose outputs are compared
Array = npt.NDArray[Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--batches", default="1,16", help="batch sizes (default: %(default)s)")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="no network is begun after these (default: %(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make artifacts and expected outputs; needs no GPU")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / ".cache", help="folder of what is prepared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    networks = options.networks.split(",")
    if options.prepare:
        for network in networks:
            prepare(network, options.cache)
        return
    missing = driver.missing()
    if missing:
        note(f"SKIPPED: THE CUDA ENGINE WAS NOT RUN: {missing}")
        return
    begin, rows, found = time.monotonic(), list[list[str]](), dict[str, Any]()
    device: dict[str, Any] = {}
    for network in networks:
        files = prepared(network, options.cache)
        if time.monotonic() - begin > options.seconds or not all(f.exists() for f in files):
            note(f"{network}: left out: {'not prepared (--prepare)' if not all(f.exists() for f in files) else 'out of time'}")
            continue
        program = load_program(files[0])
        with np.load(files[1]) as stored:
            x, expected = stored["x"], [stored[f"ratio{i}"] for i in range(len(program.ratios))]
        engine = CudaEngine(program, gpu=options.gpu)
        device = {k: v for k, v in engine.describe()["engine"].items() if k in ("device", "architecture", "low_products")}
        differing = unequal(engine, x, expected)
        note(f"{network}: {'EQUAL at all ratios' if not differing else f'DIFFERS at ratios {differing}'}")
        figures = [] if differing else measure(engine, x, [int(b) for b in options.batches.split(",")])
        found[network] = {"differing": differing, "rows": figures}
        rows += [[network, "equal" if not differing else "DIFFERS", *texts(r)] for r in figures or [{}]]
    columns = ["network", "outputs", "batch", "ratio", "call ms", "device ms", "switch ms"]
    print_table("CUDA engine", columns, rows, ", ".join(map(str, device.values())))
    if found:
        content = {"benchmark": "gpu_check", "device": device, "networks": found}
        path = options.results / f"gpu_check.{str(device['device']).lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    if any(v["differing"] for v in found.values()):
        raise SystemExit(1)


def prepared(network: str, cache: Path) -> tuple[Path, Path]:
    """(artifact, expected outputs)."""
    return cache / f"gpu_check.{network}.bitdial", cache / f"gpu_check.{network}.npz"


def prepare(network: str, cache: Path) -> None:
    """Make both, the outputs by the CPU engine, or the reference engine where it is missing: they give the same bits."""
    from common import data_folder
    from peers.models import ModelFiles
    from peers.networks import input_batch

    progress = Progress(network)
    artifact, outputs = prepared(network, cache)
    artifact.write_bytes(ModelFiles(cache, data_folder(), progress).artifact(network).read_bytes())
    program = load_program(artifact)
    np.savez(outputs, x=(x := input_batch(network, CHECKED)), **exact_outputs(program, x))  # type: ignore[arg-type]
    progress.done("prepared")


def exact_outputs(program: Program, x: Array) -> dict[str, Array]:
    """The first output at every ratio, from an engine that defines results."""
    engine = create_engine(program, default_engine(program))
    return {f"ratio{i}": first(engine.run(x, ratio)) for i, ratio in enumerate(program.ratios)}


def first(result: Any) -> Array:
    return np.asarray(result[0] if isinstance(result, tuple) else result)


def unequal(engine: CudaEngine, x: Array, expected: Sequence[Array]) -> list[float]:
    """The ratios at which outputs differ in a bit (but for the sign of zero), alone or in a batch."""
    found = []
    for ratio, want in zip(engine.ratios, expected, strict=True):
        whole, alone = first(engine.run(x, ratio)), first(engine.run(x[:1], ratio))
        if not np.array_equal(whole, want) or not np.array_equal(alone, want[:1]):
            found.append(ratio)
    return found


def measure(engine: CudaEngine, x: Array, batches: Sequence[int], repeats: int = 15) -> list[dict[str, float]]:
    """Milliseconds per batch size and ratio."""
    rows = []
    for batch in batches:
        data = np.resize(x, (batch, *x.shape[1:]))
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
                "batch": batch, "ratio": ratio, "call_ms": same, "device_ms": 1e3 * engine.seconds_per_run(batch, ratio),
                "switch_ms": statistics.median(turned) - same,
            })  # fmt: skip
    return rows


def _milliseconds(engine: CudaEngine, data: Array, ratio: float) -> float:
    begin = time.perf_counter()
    engine.run(data, ratio)
    return 1e3 * (time.perf_counter() - begin)


def texts(row: dict[str, float]) -> list[str]:
    if not row:
        return [""] * 5
    return [f"{row['batch']:.0f}", f"{row['ratio']:.2f}", *(f"{row[k]:.3f}" for k in ("call_ms", "device_ms", "switch_ms"))]


if __name__ == "__main__":
    run_command(main)
