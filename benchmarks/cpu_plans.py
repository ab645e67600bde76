"""What the CPU engine's latency table is good for: accuracy against latency of three plans of one network.

    python benchmarks/cpu_plans.py                        # ResNet-20 and VGG, all test images
    python benchmarks/cpu_plans.py --networks vgg --images 2000

  4 bits         the default: 4 bits everywhere, channels chosen by accuracy alone
  auto width     low_bits="auto": per layer the widest low range whose fastest exact kernel takes at most 1.15x the 4-bit time
  by latency     4 bits, latency_gain=0.8: channels chosen so that 50 % low has at least 40 % of the gain of 100 %

The layers' times are measured here first (batch 8). Accuracy is that of the CPU engine, which equals the reference engine's.
Latency: batch 8, one thread, the plans' ratios interleaved, medians. Prints tables, writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.cpu.layer_timing import measure_table
from bitdial.files import write_atomically
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.latency_table import layer_shape
from bitdial.quantization.program import Program
from bitdial.report.drawing import MARKERS, SMALL, Chart, write_plot
from bitdial.report.style import LINES
from common import PAPER, batches, calibration_images, test_images, trained_network
from machine import describe_machine

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

BATCH = 8


def plans(table: Any) -> dict[str, dict[str, Any]]:
    """Name -> settings that differ from the default."""
    return {
        "4 bits": {},
        "auto width": {"target": "cpu", "low_bits": "auto", "latency_table": table},
        "by latency": {"latency_table": table, "latency_gain": 0.8},
    }


def accuracy(engine: CpuEngine, ratio: float, images: Any) -> tuple[float, float]:
    """Top-1 and its standard error, in percent."""
    right = 0
    for x, labels in batches(images):
        right += int((np.asarray(engine.run(x.numpy(), ratio)).argmax(axis=1) == labels).sum())
    share = right / len(images)
    return 100 * share, 100 * float(np.sqrt(share * (1 - share) / len(images)))


def latencies(engines: dict[str, CpuEngine], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per batch by plan and ratio; all interleaved, medians."""
    times: dict[tuple[str, int], list[float]] = {}
    arrays = {name: engine.profile_arrays(BATCH) for name, engine in engines.items()}
    for _ in range(repeats):
        for name, engine in engines.items():
            for index in range(len(engine.ratios)):
                runs = [sum(engine.native.profile(arrays[name], BATCH, index, 1)) for _ in range(3)]
                times.setdefault((name, index), []).extend(runs[1:])
    return {name: [1e3 * float(np.median(times[name, i])) for i in range(len(e.ratios))] for name, e in engines.items()}


def plans_chart(rows: list[dict[str, Any]], caption: str) -> Chart:
    """One panel per network: accuracy with its standard error against milliseconds, a line per plan."""
    networks = list(dict.fromkeys(row["network"] for row in rows))

    def draw(figure: FigureBase) -> None:
        for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
            for k, row in enumerate(row for row in rows if row["network"] == network):
                axes.errorbar(
                    row["milliseconds"], row["accuracy"], yerr=row["standard_error"], color=LINES[k % len(LINES)],
                    marker=MARKERS[k % len(MARKERS)], capsize=2, label=row["plan"],
                )  # fmt: skip
                for ratio, x, y in zip(row["ratios"], row["milliseconds"], row["accuracy"], strict=True):
                    if row["plan"] == "4 bits":
                        axes.annotate(f"{ratio:.0%}", (x, y), (4, -11), textcoords="offset points", fontsize=SMALL)
            axes.set(title=network, xlabel=f"ms per batch of {BATCH}, one thread", ylabel="top-1, %")
            axes.set_xlim(left=0)
            axes.margins(y=0.3)
            axes.grid(True)
            axes.legend(loc="lower left")

    told = "; ".join(f"{row['network']}, {row['plan']}: {row['milliseconds'][-1]:.3g} ms at most low" for row in rows)
    return Chart("Accuracy against latency by plan", told, draw, (5.2 * len(networks), 4.0), caption)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet20,vgg")
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent.parent / "docs" / "cpu-plans.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, machine = Console(), describe_machine()
    isa = native.choose_isa()
    images, sample = test_images(options.images), calibration_images()
    target = Path(__file__).parent / "results" / f"cpu_plans.{machine['kind']}.json"
    rows: list[dict[str, Any]] = []
    for network in options.networks.split(","):
        base = QuantizeConfig(
            **PAPER, population=options.population, generations=options.generations, survivors=options.population // 3
        )
        model = trained_network(network)
        greedy = base.updated(selector="greedy")
        first = quantize_prepared(prepare(model, [sample], greedy), greedy)
        table = measure_table(shapes(first), isa, 1, BATCH)
        engines: dict[str, CpuEngine] = {}
        for name, settings in plans(table).items():
            config = base.updated(**settings)
            program = quantize_prepared(prepare(model, [sample], config), config)
            engines[name] = CpuEngine(program, batch_hint=BATCH)
        times = latencies(engines, options.repeats)
        for name, engine in engines.items():
            measured = [accuracy(engine, r, images) for r in engine.ratios]
            ms = times[name]
            widths = sorted({(v.amax, v.wmax) for v in engine.program.layers.values() if v.eligible})
            rows.append(
                {
                    "network": network, "plan": name, "ratios": engine.ratios, "accuracy": [a for a, _ in measured],
                    "standard_error": [e for _, e in measured], "milliseconds": ms, "speedup": ms[0] / ms[-1],
                    "gain_share_at_50": (ms[0] - ms[2]) / (ms[0] - ms[-1]), "low_ranges": widths,
                    "images": len(images), "isa": isa,
                    "search": [options.population, options.generations], "threads": 1, "batch": BATCH,
                }
            )  # fmt: skip
            out = Table(
                "ratio",
                "top-1",
                "ms",
                "speedup",
                title=f"{network}, {name}: low ranges (activations, weights) {widths}",
            )
            for ratio, (value, error), t in zip(engine.ratios, measured, ms, strict=True):
                out.add_row(f"{ratio:.0%}", f"{value:.2f} ± {error:.2f}", f"{t:.2f}", f"{ms[0] / t:.2f}")
            console.print(out)
            console.print(f"share of the gain at 50 %: {rows[-1]['gain_share_at_50']:.2f}")
        write_atomically(target, (json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n").encode())
    name = f"{native.cpu_name()} ({machine['kind']}), {isa}, one thread"
    write_plot(plans_chart(rows, name), options.plot)
    console.print(f"{name}; written: {target}, {options.plot}")
    return 0


def shapes(program: Program) -> list[Any]:
    """Shapes of the layers of a program."""
    return [
        layer_shape(program.instruction(n).as_node(), program.types, layer.weight.shape)
        for n, layer in program.layers.items()
        if layer.weight is not None
    ]


if __name__ == "__main__":
    raise SystemExit(main())
