"""Draws the README's picture: accuracy against ratio of the trained networks, from the stored rows of accuracy.py.

    python benchmarks/plot_curves.py                 writes docs/accuracy.svg
    python benchmarks/plot_curves.py --out FILE      .svg or .png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.report.drawing import SMALL, Chart, check_plot_path, write_plot
from bitdial.report.style import FIXED, INK, MAIN, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

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


def curves_chart(curves: dict[str, dict[str, Any]]) -> Chart:
    """One panel per network: the dial with its paired standard errors, float32 as a line, crude 4-bit beside it."""

    def draw(figure: FigureBase) -> None:
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for panel, (network, curve) in zip(panels, curves.items(), strict=True):
            x, y, error = ([100 * p[k] for p in curve["points"]] for k in range(3))
            top = 100 * curve["float"]
            panel.axhline(top, color=INK, linestyle="--", linewidth=1)
            panel.annotate("float32", (0, top), (0, 4), textcoords="offset points", fontsize=SMALL, color=INK)
            panel.errorbar(x, y, yerr=error, color=MAIN, marker="o", capsize=3, linewidth=2, zorder=3)
            naive = [(100 * ratio, 100 * accuracy) for ratio, accuracy in curve["naive"]]
            if naive:
                panel.plot(*zip(*naive, strict=True), color=FIXED, marker="s", linewidth=1)
                panel.annotate(
                    "top bits only", naive[-1], (-4, 6), textcoords="offset points", ha="right", fontsize=SMALL, color=MUTED
                )
            low = min([*y, *(accuracy for _, accuracy in naive)])
            panel.set(ylim=(min(low - 0.4, top - 2), top + 0.5), xticks=[0, 25, 50, 75, 100], title=NAMES.get(network, network))
            panel.set_xlabel("ratio: eligible multiplies at 4 bits, %", fontsize=SMALL)
        panels[0].set_ylabel("top-1 on CIFAR-10 (JPEG), %")

    told = "; ".join(f"{NAMES.get(n, n)}: {', '.join(f'{100 * p[1]:.2f} %' for p in c['points'])}" for n, c in curves.items())
    return Chart("Accuracy against ratio", told, draw, (3.1 * len(curves), 3.1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=root / "docs" / "accuracy.svg")
    options = parser.parse_args()
    check_plot_path(options.out, "--out")
    curves = stored_curves(options.results)
    if not curves:
        print(f"error: no baseline rows in {options.results}; run benchmarks/accuracy.py first", file=sys.stderr)
        return 2
    write_plot(curves_chart(curves), options.out)
    print(f"wrote {options.out} ({', '.join(curves)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
