"""Accuracy against cycles of the trained networks on the NPU: what the dial costs and what it buys there.

Networks of the data folder, quantized with the defaults of target="npu" (groups of 64 for 32 rows; for another array groups of
twice its rows), no training; top-1 on CIFAR-10's test images at every ratio, cycles and energy of one image by the cycle model.
The engine is `npu`: its accumulators are the array's. Layers that the host runs (attention's two products) are not in the cycles.

    python benchmarks/npu_accuracy.py                        10 minutes; writes npu_accuracy.KIND.json and docs/npu-accuracy.svg
    python benchmarks/npu_accuracy.py --networks ""          draws the stored rows again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bitdial
from bitdial.engines.base import create_engine
from bitdial.report.drawing import SMALL, Chart, check_plot_path, write_plot
from bitdial.report.style import INK, LINES
from common import RESULTS, ROOT, Progress, machine_caption, percent, print_table, run_command
from machine import describe_machine
from real_networks_data import NETWORKS
from results import ResultFile

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

ARRAYS = {"resnet20": (32, 8), "vgg": (32,), "vit": (32,)}  # square, rows
NAMES = {"resnet20": "ResNet-20", "vgg": "VGG", "vit": "ViT"}
BATCH = 100


def measure(name: str, rows: int, images: int | None, progress: Progress) -> dict[str, Any]:
    """Accuracy, cycles, energy and use of the array by ratio."""
    network = NETWORKS[name]
    config = bitdial.QuantizeConfig(target="npu", group_size=2 * rows, calibration_images=network.calibration)
    calibration = [torch.from_numpy(x) for x in network.samples(network.calibration)]
    program = bitdial.quantize(network.load(), calibration, config, progress=progress).program
    engine: Any = create_engine(program, "npu", rows=rows, columns=rows)
    (inputs,), score = network.tests(images)
    labels = score.labels  # type: ignore[attr-defined]
    starts = range(0, len(inputs), BATCH)
    ratios = []
    for index, ratio in enumerate(engine.ratios):
        outputs = [engine.run(np.ascontiguousarray(inputs[i : i + BATCH]), ratio) for i in starts]
        cost = engine.describe()["engine"]["totals"][index]
        ratios.append({
            "ratio": ratio, "accuracy": float(np.mean(np.concatenate(outputs).argmax(-1) == labels)), "cycles": cost["cycles"],
            "picojoules": cost["picojoules"], "utilisation": cost["utilisation"], "dram_bytes": cost["dram_bytes"],
        })  # fmt: skip
    with torch.no_grad():
        model = network.load()
        answers = torch.cat([model(torch.from_numpy(inputs[i : i + BATCH])).argmax(-1) for i in starts])
    described = engine.describe()["engine"]
    return {
        "float": float(np.mean(answers.numpy() == labels)), "images": len(inputs), "ratios": ratios, "host": described["host"],
        "reorders": described["reorders"],
    }  # fmt: skip


def chart(rows: dict[str, dict[str, Any]]) -> Chart:
    """One panel a network, one line an array; a point is a ratio, the first at 100 % of the cycles."""
    by_network: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, row in rows.items():
        network, _, size = name.partition("/")
        by_network.setdefault(network, []).append((int(size.partition("x")[0]), row))

    def draw(figure: FigureBase) -> None:
        panels = figure.subplots(1, len(by_network), squeeze=False)[0]
        for panel, (network, found) in zip(panels, by_network.items(), strict=True):
            top = 100 * found[0][1]["float"]
            panel.axhline(top, color=INK, linestyle="--", linewidth=1)
            lowest = top
            for (size, row), colour in zip(found, LINES, strict=False):
                x = [100 * r["cycles"] / row["ratios"][0]["cycles"] for r in row["ratios"]]
                y = [100 * r["accuracy"] for r in row["ratios"]]
                panel.plot(x, y, color=colour, marker="o", linewidth=2, zorder=3, label=array(size))
                lowest = min(lowest, *y)
            panel.annotate("float32", (46, top), (0, 4), textcoords="offset points", ha="right", fontsize=SMALL, color=INK)
            bottom = min(lowest - 0.4, top - 1.8)
            panel.set(ylim=(bottom, top + 0.4), xlim=(104, 46), xticks=range(50, 101, 10))
            panel.set_yticks(np.arange(np.ceil(2 * bottom), 2 * top + 0.8) / 2)
            panel.set_title(NAMES[network] if len(found) > 1 else f"{NAMES[network]}, {array(found[0][0])}")
            panel.set_xlabel("cycles, % of those at 8 bits", fontsize=SMALL)
            if len(found) > 1:
                panel.legend(fontsize=SMALL, loc="lower left", frameon=False)
        panels[0].set_ylabel("top-1 on CIFAR-10 (JPEG), %")

    told = "; ".join(
        f"{name}: " + ", ".join(f"{100 * r['accuracy']:.2f} % at {r['cycles']:,} cycles" for r in row["ratios"])
        for name, row in rows.items()
    )
    remark = "Points: 0, 25, 50, 75 and 100 % of the eligible multiplies at 4 bits, from left to right; dashed: float32"
    return Chart("Accuracy against cycles on the NPU", told, draw, (3.1 * len(by_network), 3.2), remark)


def array(size: int) -> str:
    """In words."""
    return f"{size} x {size}, groups of {2 * size}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(ARRAYS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--images", type=int, default=None, help="test images (default: all 10,000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "npu-accuracy.svg", help=".svg or .png")
    options = parser.parse_args(arguments)
    check_plot_path(options.plot, "--plot")
    machine = describe_machine()
    results = ResultFile(options.results / f"npu_accuracy.{machine['kind']}.json", "npu_accuracy", machine)
    for name in filter(None, options.networks.split(",")):
        if missing := NETWORKS[name].missing():
            raise SystemExit(f"error: {missing}")
        for size in ARRAYS[name]:
            settings = {"network": name, "array": [size, size], "group_size": 2 * size, "images": options.images}
            row = f"{name}/{size}x{size}"
            if results.find(row, settings) is None:
                progress = Progress(row)
                results.put(row, settings, measure(name, size, options.images, progress))
                progress.done("measured")
    lines = []
    for name, row in results.rows.items():
        for r in row["ratios"]:
            lines.append([
                name, f"{r['ratio']:.0%}", percent(r["accuracy"]), f"{100 * (r['accuracy'] - row['float']):+.2f}",
                f"{r['cycles']:,}", percent(r["cycles"] / row["ratios"][0]["cycles"], 0), percent(r["utilisation"], 0),
                f"{1e-6 * r['picojoules']:.1f}",
            ])  # fmt: skip
    print_table(
        "Accuracy and cycles of one image, defaults of target=\"npu\", no training",
        ["network, array", "ratio", "top-1, %", "to float", "cycles", "% of 0 %", "array used, %", "uJ"], lines,
        machine_caption(machine),
    )  # fmt: skip
    write_plot(chart(results.rows), options.plot)
    print(f"wrote {options.plot}")


if __name__ == "__main__":
    run_command(main)
