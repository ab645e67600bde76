"""Draws the README's picture: accuracy against ratio of the trained networks, from the stored rows of accuracy.py.

    python benchmarks/plot_curves.py                 writes docs/accuracy.svg
    python benchmarks/plot_curves.py --out FILE      .svg or .png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"resnet20": "#0072b2", "resnet56": "#009e73", "vgg": "#d55e00", "vit": "#7b3294"}
NAMES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "vgg": "VGG", "vit": "ViT"}


def stored_curves(folder: Path) -> dict[str, dict[str, Any]]:
    """Network -> {"float": accuracy, "points": [(ratio, accuracy)], "cpu": machine} of its baseline row."""
    curves: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("accuracy.*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows, network = document["rows"], path.name.split(".")[1]
        if "baseline" not in rows or "float32" not in rows:
            continue
        curves[network] = {
            "float": rows["float32"]["accuracy"],
            "points": [(r["ratio"], r["accuracy"], r["to_float_standard_error"]) for r in rows["baseline"]["ratios"]],
            "naive": [(r["ratio"], r["accuracy"]) for r in rows.get("crude", {}).get("ratios", [])],
        }
    return curves


def draw(curves: dict[str, dict[str, Any]], out: Path) -> None:
    """One panel per network: the dial with its paired standard errors, float32 as a line, crude 4-bit beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(3.1 * len(curves), 3.1), squeeze=False)
    for panel, (network, curve) in zip(panels[0], curves.items(), strict=True):
        colour = COLOURS.get(network, "#333333")
        x = [100 * p[0] for p in curve["points"]]
        y = [100 * p[1] for p in curve["points"]]
        error = [100 * p[2] for p in curve["points"]]
        panel.axhline(100 * curve["float"], color="#555555", linestyle="--", linewidth=1)
        panel.errorbar(x, y, yerr=error, color=colour, marker="o", capsize=3, linewidth=2, zorder=3)
        if curve["naive"]:
            nx, ny = [100 * p[0] for p in curve["naive"]], [100 * p[1] for p in curve["naive"]]
            panel.plot(nx, ny, color="#999999", marker="s", linewidth=1)
            panel.annotate("top bits only", (nx[-1], ny[-1]), (-4, 6), textcoords="offset points", ha="right", color="#777777")
        low = min([*y, *(100 * p[1] for p in curve["naive"])])
        panel.set_ylim(min(low - 0.4, 100 * curve["float"] - 2), 100 * curve["float"] + 0.5)
        panel.annotate("float32", (0, 100 * curve["float"]), (0, 4), textcoords="offset points", fontsize=8, color="#555555")
        panel.set_title(NAMES.get(network, network), loc="left", fontsize=11)
        panel.set_xlabel("ratio: eligible multiplies at 4 bits, %", fontsize=8)
        panel.set_xticks([0, 25, 50, 75, 100])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("top-1 on CIFAR-10 (JPEG), %", fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=root / "docs" / "accuracy.svg")
    options = parser.parse_args()
    curves = stored_curves(options.results)
    if not curves:
        print(f"error: no baseline rows in {options.results}; run benchmarks/accuracy.py first", file=sys.stderr)
        return 2
    draw(curves, options.out)
    print(f"wrote {options.out} ({', '.join(curves)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
