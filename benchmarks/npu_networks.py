"""Networks on the NPU's cycle model, from the shapes of their layers alone (224 x 224 pictures, one at a time).

Every layer but the first, the last and the depthwise ones may run low; at ratio r the share r of each one's groups is low. Groups
smaller than twice the rows leave lanes empty (padding allowed), so that their columns show what that costs. Products of two
activations are the host's and not counted. SCALE-Sim's cycles for 8-bit layers are its weight-stationary convention, folds *
(2 rows + columns + pixels - 2) - 1 a layer: no load is hidden, and no word is fetched.

    python benchmarks/npu_networks.py [--output benchmarks/results/npu_networks.json] [networks ...]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.engines.npu.costs import Energy, Machine, layer_cost, switch_cycles, total
from bitdial.engines.npu.plan import Design, Geometry, LayerPlan, dense_chunks, plan_layer
from bitdial.files import write_atomically
from bitdial.quantization.instructions import Window
from common import print_table

DESIGN = Design(activations=4096, weights=1 << 15, shifts=256, sums=4096)
RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
Layers = list[tuple[str, Geometry]]


class Shapes:
    """Layers of a network one after the other; `size` is that of the present picture."""

    def __init__(self, size: int = 224) -> None:
        self.size = size
        self.layers: Layers = []

    def conv(
        self, channels: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, padding: int | None = None
    ) -> None:
        pad = kernel // 2 if padding is None else padding
        window = Window((kernel,) * 2, (stride,) * 2, (pad,) * 2, (1, 1))
        g = Geometry(channels, outputs, (self.size, self.size), window, groups)
        self.layers.append((f"layer {len(self.layers)}", g))
        self.size = g.out_size[0]

    def linear(self, channels: int, outputs: int, rows: int = 1) -> None:
        self.layers.append((f"layer {len(self.layers)}", Geometry.linear(channels, outputs, rows)))


def resnet(depths: tuple[int, ...], bottleneck: bool) -> Layers:
    net = Shapes()
    net.conv(3, 64, 7, 2)
    net.size, channels = 56, 64  # after the max pool
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if stage and not block else 1
            before = net.size
            if bottleneck:
                net.conv(channels, width, 1)
                net.conv(width, width, 3, stride)
                net.conv(width, outputs, 1)
            else:
                net.conv(channels, width, 3, stride)
                net.conv(width, width, 3)
            if channels != outputs or stride > 1:
                net.size = before
                net.conv(channels, outputs, 1, stride)
            channels = outputs
    net.linear(channels, 1000)
    return net.layers


def mobilenet_v2() -> Layers:
    net = Shapes()
    net.conv(3, 32, 3, 2)
    channels = 32
    for expansion, outputs, blocks, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(blocks):
            wide = expansion * channels
            if expansion > 1:
                net.conv(channels, wide, 1)
            net.conv(wide, wide, 3, first_stride if not block else 1, wide)
            net.conv(wide, outputs, 1)
            channels = outputs
    net.conv(channels, 1280, 1)
    net.linear(1280, 1000)
    return net.layers


def transformer(net: Shapes, width: int, depth: int, tokens: int) -> None:
    for _ in range(depth):
        net.linear(width, 3 * width, tokens)
        net.linear(width, width, tokens)
        net.linear(width, 4 * width, tokens)
        net.linear(4 * width, width, tokens)


def vit(width: int, extra: int = 1) -> Layers:
    """Patches of 16; extra: class (and distillation) tokens."""
    net = Shapes()
    net.conv(3, width, 16, 16, padding=0)
    transformer(net, width, 12, 196 + extra)
    net.linear(width, 1000)
    return net.layers


def swin_tiny() -> Layers:
    net = Shapes()
    net.conv(3, 96, 4, 4, padding=0)
    for stage, depth in enumerate((2, 2, 6, 2)):
        width, tokens = 96 << stage, 3136 >> 2 * stage
        if stage:
            net.linear(2 * width, width, tokens)  # patches of 2 x 2 merged
        transformer(net, width, depth, tokens)
    net.linear(768, 1000)
    return net.layers


NETWORKS: dict[str, Callable[[], Layers]] = {
    "resnet18": lambda: resnet((2, 2, 2, 2), False),
    "resnet34": lambda: resnet((3, 4, 6, 3), False),
    "resnet50": lambda: resnet((3, 4, 6, 3), True),
    "mobilenet_v2": mobilenet_v2,
    "vit_small": lambda: vit(384),
    "vit_base": lambda: vit(768),
    "deit_small_distilled": lambda: vit(384, 2),
    "swin_tiny": swin_tiny,
}


def plans(layers: Layers, group: int) -> list[LayerPlan]:
    result = []
    for i, (name, g) in enumerate(layers):
        if g.conv_groups > 1:
            result.append(plan_layer(name, g, [], DESIGN, len(RATIOS)))
            continue
        bounds = np.array([*range(0, g.channels, group), g.channels], np.int32)
        n = len(bounds) - 1
        low = np.zeros((len(RATIOS), n), bool)
        if 0 < i < len(layers) - 1:
            for r, ratio in enumerate(RATIOS):
                low[r, : round(ratio * n)] = True
        chunks = dense_chunks(name, bounds, low, np.zeros(n, np.uint8), DESIGN.rows, True)
        result.append(plan_layer(name, g, chunks, DESIGN, len(RATIOS)))
    return result


def scale_sim_cycles(layers: Layers) -> int:
    """Of all layers without convolution groups, at 8 bits."""
    cycles = 0
    for _, g in layers:
        if g.conv_groups == 1:
            folds = math.ceil(g.taps * g.channels / DESIGN.rows) * math.ceil(g.outputs / DESIGN.columns)
            cycles += folds * (2 * DESIGN.rows + DESIGN.columns + math.prod(g.out_size) - 2) - 1
    return cycles


def examine(name: str) -> dict[str, Any]:
    layers = NETWORKS[name]()
    machine = Machine(DESIGN)
    result: dict[str, Any] = {"layers": len(layers), "ratios": RATIOS, "groups": {}}
    for group in (16, 32, 64):
        made = plans(layers, group)
        rows = []
        for r in range(len(RATIOS)):
            costs = [layer_cost(plan, machine, r) for plan in made]
            row = total(costs).as_json()
            grouped = [c for c, p in zip(costs, made, strict=True) if p.geometry.conv_groups > 1]
            if grouped:
                own = total(grouped)
                row["grouped_cycles"], row["grouped_utilisation"] = own.cycles, own.utilisation
            rows.append(row)
        result["groups"][str(group)] = rows
    dense = [plan for plan in plans(layers, 64) if plan.geometry.conv_groups == 1]
    result["dense_array_cycles_8bit"] = sum(layer_cost(p, machine, 0).array_cycles for p in dense)
    result["scale_sim_convention_8bit"] = scale_sim_cycles(layers)
    result["switch_cycles"] = switch_cycles(len(layers))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], default=[])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "npu_networks.json")
    given = parser.parse_args()
    found = {name: examine(name) for name in given.networks or NETWORKS}
    settings = {"design": vars(DESIGN), "megahertz": 1000.0, "dram_bytes_per_cycle": 32.0, "energy_pj": vars(Energy())}
    write_atomically(given.output, (json.dumps({"settings": settings, "networks": found}, indent=1) + "\n").encode())
    for name, row in found.items():
        lines = []
        for group, by_ratio in row["groups"].items():
            for ratio, cost in zip(RATIOS, by_ratio, strict=True):
                lines.append([
                    group, f"{100 * ratio:.0f} %", f"{cost['cycles']:,}", f"{100 * cost['cycles'] / by_ratio[0]['cycles']:.1f} %",
                    f"{100 * cost['utilisation']:.0f} %", f"{cost['dram_bytes'] / 1e6:.1f}", f"{cost['picojoules'] / 1e9:.2f}",
                ])  # fmt: skip
        grouped = row["groups"]["64"][0]
        starved = (
            f"; grouped layers take {100 * grouped['grouped_cycles'] / grouped['cycles']:.0f} % of the 8-bit cycles at "
            f"{100 * grouped['grouped_utilisation']:.1f} % use of the array" if "grouped_cycles" in grouped else ""
        )
        print_table(
            f"{name} on 32 x 32", ["group", "ratio", "cycles", "of 0 %", "array used", "MB", "mJ"], lines,
            f"8-bit array cycles without grouped layers {row['dense_array_cycles_8bit']:,}, SCALE-Sim's convention "
            f"{row['scale_sim_convention_8bit']:,}; a switch {row['switch_cycles']} cycles{starved}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
