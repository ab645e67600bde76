"""Networks on the NPU's cycle model, from the shapes of their layers alone (224 x 224 pictures, one at a time).

Every layer but the first, the last and the depthwise ones may run low; at ratio r the share r of each one's groups is low. Groups
smaller than twice the rows leave lanes empty (padding allowed), so that their columns show what that costs. Products of two
activations are the host's and not counted.

Reorders: those that the layout pass leaves on the networks as torchvision and timm build them (skipped, with a word, where these
are not installed), and what it would cost to reorder the input of every layer that may run low instead: each a copy through
memory, as `bitdial.engines.npu.costs` has it.

--scalesim: SCALE-Sim itself (pip install scalesim) beside the cycle model for every 8-bit layer without groups; without it only
its convention is counted (`npu_scalesim` says what that is).

    python benchmarks/npu_networks.py [--scalesim] [--output benchmarks/results/npu_networks.json] [networks ...]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import npu_reorders
import npu_scalesim
from bitdial.engines.npu.costs import Energy, Machine, layer_cost, reorder_cost, switch_cycles, total
from bitdial.engines.npu.plan import Design, Geometry, LayerPlan, dense_chunks, plan_layer
from bitdial.files import write_atomically
from bitdial.quantization.instructions import Window
from common import note, print_table

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


def swin(depths: tuple[int, ...]) -> Layers:
    net = Shapes()
    net.conv(3, 96, 4, 4, padding=0)
    for stage, depth in enumerate(depths):
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
    "swin_tiny": lambda: swin((2, 2, 6, 2)),
    "swin_small": lambda: swin((2, 2, 18, 2)),
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


def scale_sim_rows(layers: Layers, group: int, ask: bool) -> list[dict[str, Any]]:
    """Per layer without groups, at 8 bits: cycles of the array here (words and draining of its jobs included), of its own tiles
    under SCALE-Sim's schedule, of SCALE-Sim's convention and, if asked, of the package."""
    rows = []
    for (name, g), plan in zip(layers, plans(layers, group), strict=True):
        if g.conv_groups > 1:
            continue
        row: dict[str, Any] = {
            "layer": name, "rows": math.prod(g.out_size), "channels": g.channels, "taps": g.taps, "outputs": g.outputs,
            "array_cycles": layer_cost(plan, Machine(DESIGN), 0).array_cycles,
            "own_tiles_in_its_schedule": npu_scalesim.plan_cycles(plan, DESIGN),
            "convention": npu_scalesim.convention_cycles(g, DESIGN),
            "packs_taps": npu_scalesim.packs_taps(g, DESIGN),
        }  # fmt: skip
        if ask:
            row["scale_sim"] = npu_scalesim.package_cycles(g, DESIGN)
        rows.append(row)
    return rows


def reorders(name: str, layers: Layers, by_ratio: list[dict[str, Any]]) -> dict[str, Any]:
    """Those that layout leaves; and the share of all cycles, by ratio, if the input of every layer that may run low were
    reordered instead."""
    sizes = [g.channels * math.prod(g.size) for i, (_, g) in enumerate(layers) if 0 < i < len(layers) - 1 and g.conv_groups == 1]
    every = total(reorder_cost(size, Machine(DESIGN)) for size in sizes).cycles
    found: dict[str, Any] = {"of_every_layer": {
        "count": len(sizes), "bytes": sum(sizes), "cycles": every, "share": [every / (every + row["cycles"]) for row in by_ratio],
    }}  # fmt: skip
    if why := npu_reorders.missing(name):
        note(why)
        return {"skipped": why, **found}
    left = npu_reorders.left_by_layout(name, 64)
    own = reorder_cost(left["bytes"], Machine(DESIGN)).cycles
    return {"left": left | {"cycles": own, "share": [own / (own + row["cycles"]) for row in by_ratio]}, **found}


def examine(name: str, ask: bool) -> dict[str, Any]:
    layers = NETWORKS[name]()
    machine = Machine(DESIGN)
    result: dict[str, Any] = {"layers": len(layers), "ratios": RATIOS, "groups": {}}
    for group in (16, 32, 64):
        made = plans(layers, group)
        by_ratio = []
        for r in range(len(RATIOS)):
            costs = [layer_cost(plan, machine, r) for plan in made]
            row = total(costs).as_json()
            grouped = [c for c, p in zip(costs, made, strict=True) if p.geometry.conv_groups > 1]
            if grouped:
                own = total(grouped)
                row["grouped_cycles"], row["grouped_utilisation"] = own.cycles, own.utilisation
            by_ratio.append(row)
        result["groups"][str(group)] = by_ratio
    rows = scale_sim_rows(layers, 64, ask)
    result["dense_array_cycles_8bit"] = sum(row["array_cycles"] for row in rows)
    result["scale_sim_convention_8bit"] = sum(row["convention"] for row in rows)
    if ask:
        result["scale_sim_8bit"] = sum(row["scale_sim"] for row in rows)
        equal = [row["scale_sim"] == row["own_tiles_in_its_schedule"] for row in rows if not row["packs_taps"]]
        result["scale_sim_equal"] = [sum(equal), len(equal), len(rows)]
    result["scale_sim_layers"] = {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
    result["reorders"] = reorders(name, layers, result["groups"]["64"])
    result["switch_cycles"] = switch_cycles(len(layers))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], default=[])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "npu_networks.json")
    parser.add_argument("--scalesim", action="store_true", help="ask SCALE-Sim itself for every 8-bit layer")
    given = parser.parse_args()
    why = npu_scalesim.missing() if given.scalesim else ""
    if why:
        note(why)
    ask = given.scalesim and not why
    found = {}
    for name in given.networks or NETWORKS:
        note(name)
        found[name] = examine(name, ask)
    settings: dict[str, Any] = {
        "design": vars(DESIGN), "megahertz": 1000.0, "dram_bytes_per_cycle": 32.0, "energy_pj": vars(Energy()),
    }  # fmt: skip
    if ask:
        settings["scale_sim"] = npu_scalesim.version()
    text = json.dumps({"settings": settings, "networks": found}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text)  # a row, a line
    write_atomically(given.output, (text + "\n").encode())
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
            f"{row['scale_sim_convention_8bit']:,}{scale_sim_text(row)}; a switch {row['switch_cycles']} cycles{starved}\n"
            f"{reorder_text(row['reorders'])}",
        )  # fmt: skip


def scale_sim_text(row: dict[str, Any]) -> str:
    if "scale_sim_8bit" not in row:
        return ""
    equal, shared, layers = row["scale_sim_equal"]
    return (
        f", SCALE-Sim itself {row['scale_sim_8bit']:,} (equal to this model's tiles under its schedule in {equal} of the "
        f"{shared} layers of {layers} that both fold alike)"
    )


def reorder_text(row: dict[str, Any]) -> str:
    every = row["of_every_layer"]
    text = (
        f"reordering the input of all {every['count']} layers that may run low would take {100 * every['share'][0]:.1f} % of the "
        f"time at 0 % and {100 * every['share'][-1]:.1f} % at 100 %"
    )
    if "skipped" in row:
        return f"{text}; {row['skipped']}"
    left = row["left"]
    return f"reorders that layout leaves: {left['count']}, {100 * left['share'][-1]:.1f} % of the time at 100 %; {text}"


if __name__ == "__main__":
    main()
