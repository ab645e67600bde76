"""Layer-wise plans: what scoring costs, how accurate plans are beside other rankings, what fusion buys.

    python benchmarks/layerwise.py --part cost        time of scoring against parameters, with docs/layerwise.svg
    python benchmarks/layerwise.py --part accuracy    plans by every metric, an n-run search, random, first/last; equal budgets
    python benchmarks/layerwise.py --part structure   ResNet-18, ResNet-50, SqueezeNet, VGG-16, MobileNetV2: pairs, time, latency
    python benchmarks/layerwise.py --part rankings    the same networks: plans by scores, n-run searches and rules

Baselines go through the same planner at the same budgets, with their own losses; only the ranking differs. The n-run search
is the older one: each layer alone at its lowest precision, the others in float, one run over validation images of the train part;
and once more with the others at 8 bits, which all runs in the CPU engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.graph.capture import capture
from bitdial.pipeline.layerwise import Compilation
from bitdial.pipeline.layerwise_analysis import Analysis, analyse
from bitdial.quantization.program import Program
from bitdial.report.drawing import Chart, write_plot
from bitdial.report.style import FIXED, MAIN
from bitdial.selection.layerwise import ALL_METRICS, METRICS, LayerwiseConfig, Losses, layer_losses
from bitdial.zoo.datasets import ImageSet, load_dataset
from common import (
    NETWORKS,
    ROOT,
    Options,
    Progress,
    calibration_images,
    data_folder,
    file_digest,
    machine_caption,
    make_parser,
    open_results,
    percent,
    print_table,
    read_options,
    run_command,
    test_images,
    trained_network,
    weights_file,
)
from layerwise_rankings import n_runs, rules, search_kinds
from layerwise_structure import RANKING_BUDGETS, STRUCTURES, measure_rankings, measure_structure
from measure import make_engine
from results import ResultFile

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

WIDTHS = (16, 32, 64, 128, 256)
DEPTH = 12
BUDGETS: dict[str, dict[str, Any]] = {
    "low+int8, 60 % of the bytes": {"budget_size": "60%", "precisions": ("low", "int8")},
    "low+int8, 75 % of the bytes": {"budget_size": "75%", "precisions": ("low", "int8")},
    "low+int8, 85 % of the time": {"budget_latency": "85%", "precisions": ("low", "int8")},
    "int8+float32, 150 % of the bytes": {"budget_size": "150%", "precisions": ("int8", "float32")},
}
SCORE_ORDER = ("propagated", "combined", "n runs")  # methods whose plain ranking is tried beside gain per cost


class Chain(nn.Module):
    """Residual blocks of one width on 8x8 maps: parameters grow with the square of the width, the depth stays."""

    def __init__(self, width: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.relu(x + 0.3 * layer(x))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


# -- cost ------------------------------------------------------------------------------------------------------------------


def measure_cost(width: int) -> dict[str, Any]:
    """Seconds of the steps of scoring, after capture, for one width; `cpu_seconds` is time on the processor, so that what else
    runs on the machine does not count."""
    torch.manual_seed(0)
    model = Chain(width).eval()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    config = LayerwiseConfig(budget_size="80%", calibration_images=64)
    graph = capture(model, (x[:2],))
    on_processor = time.process_time()
    analysis = analyse(graph, [x], config)
    on_processor = time.process_time() - on_processor
    started = time.perf_counter()
    compilation = Compilation(analysis, config)
    compilation.plan(0.8 * sum(max(o.size for o in layer.options) for layer in compilation.options), None)
    ranking = time.perf_counter() - started
    steps = {k: v for k, v in analysis.seconds.items() if k != "capture"}
    return {
        "width": width,
        "parameters": sum(e.parameters for e in analysis.evidence),
        "layers": len(analysis.evidence),
        "steps": {**steps, "plan": ranking},
        "seconds": sum(steps.values()),
        "cpu_seconds": on_processor,
    }


def slope(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], float]) -> float:
    """Exponent of time against parameters, by least squares on logarithms."""
    x = np.log([row["parameters"] for row in rows])
    y = np.log([key(row) for row in rows])
    return float(np.polyfit(x, y, 1)[0])


def cost_chart(rows: Sequence[dict[str, Any]], caption: str) -> Chart:
    """Seconds against parameters on logarithmic axes, with a line of slope 1."""
    x, y = [row["parameters"] for row in rows], [row["cpu_seconds"] for row in rows]
    label = f"two runs, shifts and scores: slope {slope(rows, lambda r: r['cpu_seconds']):.2f}"

    def draw(figure: FigureBase) -> None:
        axes = figure.add_subplot()
        axes.loglog(x, y, "o-", color=MAIN, label=label)
        axes.loglog(x, [y[-1] * n / x[-1] for n in x], "--", color=FIXED, label="slope 1")
        axes.set(xlabel="parameters", ylabel="seconds on the processor")
        axes.legend()

    return Chart("Seconds against parameters", label, draw, (5.2, 3.4), caption)


# -- accuracy --------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A trained network with its test images and the validation images of the n-run search."""

    model: nn.Module
    test: ImageSet
    validation: ImageSet

    def soft_labels(self, images: ImageSet) -> list[tuple[Tensor, Tensor, Tensor]]:
        result = []
        with torch.no_grad():
            for pixels, labels in images.batches(100):
                x = torch.from_numpy(pixels)
                result.append((x, torch.from_numpy(np.asarray(labels)), torch.softmax(self.model(x), 1)))
        return result

    @staticmethod
    def figures(program: Program, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        """Accuracy, and root mean square distance of soft labels to the float network's."""
        engine = make_engine(program)
        right = count = 0
        squares = 0.0
        for x, labels, soft in batches:
            outputs = engine.run(x, program.ratios[-1])
            right += int((outputs.argmax(1) == labels).sum())
            squares += float((torch.softmax(outputs, 1) - soft).square().sum())
            count += len(x)
        return {"accuracy": right / count, "distance": (squares / count) ** 0.5, "samples": count}


def rankings(analysis: Analysis, bench: Bench, progress: Progress) -> tuple[dict[str, Losses], dict[str, float]]:
    """Losses by method, and the seconds on the processor that each took beyond what the two runs took."""
    evidence = analysis.evidence
    losses: dict[str, Losses] = {m: layer_losses(evidence, [m]) for m in ALL_METRICS}
    losses["combined"] = layer_losses(evidence, METRICS)
    for left_out in METRICS:
        losses[f"combined without {left_out}"] = layer_losses(evidence, [m for m in METRICS if m != left_out])
    for change in ("output", "power", "decibel"):
        losses[f"sqnr ({change})"] = layer_losses(evidence, ["sqnr"], change)
    losses.update(rules(analysis))
    seconds = dict.fromkeys(losses, 0.0)
    batches = bench.soft_labels(bench.validation)
    for kind, other in search_kinds(analysis).items():
        losses[kind], seconds[kind] = n_runs(
            analysis, other,
            lambda program: bench.figures(program, batches)["distance"] ** 2,
            lambda share, kind=kind: progress(kind, share),
        )  # fmt: skip
    return losses, seconds


def measure_accuracy(network: str, options: Options, progress: Progress) -> dict[str, Any]:
    images = options.images
    calibration = calibration_images(0, options.extra.calibration)
    train = load_dataset(data_folder() / "cifar10", "train").shuffled(1).head(options.extra.validation)
    bench = Bench(trained_network(network), test_images(images), train)
    test = bench.soft_labels(bench.test)
    right = sum(int((soft.argmax(1) == labels).sum()) for _, labels, soft in test)
    result: dict[str, Any] = {"float": right / sum(len(x) for x, _, _ in test), "budgets": {}}
    for precisions in dict.fromkeys(b["precisions"] for b in BUDGETS.values()):
        own = {name: b for name, b in BUDGETS.items() if b["precisions"] == precisions}
        base = LayerwiseConfig(**next(iter(own.values())), calibration_images=options.extra.calibration)
        graph = capture(bench.model, (calibration[:2],))
        started = time.process_time()  # what else runs on the machine does not count
        analysis = analyse(graph, [calibration], base, progress=progress)
        scoring = time.process_time() - started
        losses, extra = rankings(analysis, bench, progress)
        for name, budget in own.items():
            rows: dict[str, Any] = {}
            for order in ("density", "score"):
                config = LayerwiseConfig(**budget, calibration_images=options.extra.calibration, order=order)
                for method, values in losses.items():
                    if order == "score" and method not in SCORE_ORDER:
                        continue
                    compiled = Compilation(analysis, config, values).run()
                    counts = list(compiled.plan.precisions.values())
                    rows[f"{method}, {order}"] = {
                        **Bench.figures(compiled.program, test),
                        "preparation_seconds": extra[method] or scoring,
                        "size": compiled.reached["size"],
                        "latency_share_of_int8": compiled.reached["latency_share_of_int8"],
                        "layers": {p: counts.count(p) for p in precisions},
                    }
                progress(name, 1.0)
            result["budgets"][name] = {"rows": rows, "layers": len(analysis.layers), "scoring_seconds": scoring}
    return result


# -- the command -----------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.file: ResultFile = open_results(options, "layerwise", "layerwise")

    def row(self, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        own = {**settings, "threads": self.file.machine["threads"]}
        row, now = self.file.measure(name, own, measure, changed=self.options.changed)
        if now:
            Progress(name).done("measured")
        return row

    def cost(self) -> None:
        rows = [
            self.row(f"cost.{w}", {"width": w, "depth": DEPTH}, lambda w=w: measure_cost(w))
            for w in self.options.extra.widths
        ]
        caption = machine_caption(rows[-1]["machine"])
        columns = ["parameters", *rows[0]["steps"], "all but capture", "on the processor"]
        shown = [
            [f"{r['parameters']:,}", *(f"{v:.3f}" for v in (*r["steps"].values(), r["seconds"], r["cpu_seconds"]))]
            for r in rows
        ]
        whole = slope(rows, lambda r: r["cpu_seconds"])
        print_table(f"Seconds to score by parameters; exponent {whole:.2f}", columns, shown, caption)
        if self.options.extra.svg is not None:
            write_plot(cost_chart(rows, caption), self.options.extra.svg)

    def accuracy(self) -> None:
        extra = self.options.extra
        for network in self.options.networks:
            settings = {
                "network": network, "weights": file_digest(weights_file(network)), "images": self.options.images,
                "calibration": extra.calibration, "validation": extra.validation, "budgets": listed(BUDGETS),
            }  # fmt: skip
            row = self.row(
                f"accuracy.{network}", settings, lambda n=network: measure_accuracy(n, self.options, Progress(n))
            )
            for budget, found in row["budgets"].items():
                lines = [
                    [
                        name, percent(r["accuracy"]), f"{r['distance']:.4f}", f"{r['preparation_seconds']:.1f}",
                        " ".join(f"{n} {p}" for p, n in r["layers"].items()),
                    ]
                    for name, r in found["rows"].items()
                ]  # fmt: skip
                print_table(
                    f"{network}, {budget}; float {percent(row['float'])}",
                    ["ranking, order", "top-1 %", "distance to float", "processor seconds to rank", "layers"],
                    lines,
                    machine_caption(row["machine"]),
                )

    def structure(self) -> None:
        lines = []
        for name in self.options.extra.structures:
            size = self.options.extra.size
            row = self.row(f"structure.{name}", {"size": size}, lambda n=name, s=size: measure_structure(n, s))
            b, t = row["borders"], row["latency"]
            mixed = row["borders_every_fourth_layer_float32"]
            milliseconds = [
                f"{1e3 * t[k]:.2f}" if k in t else "-" for k in ("best", "none", "isolated", "all int8, best")
            ]
            gain = f"{100 * (t['none'] / t['best'] - 1):.0f} %" if "none" in t else "-"
            lines.append(
                [
                    name, f"{row['parameters'] / 1e6:.1f} M", f"{row['scoring_seconds']:.1f}",
                    "/".join(str(b[k]["pairs"]) for k in ("isolated", "unfused", "best")),
                    "/".join(str(mixed[k]["pairs"]) for k in ("isolated", "unfused", "default", "best")),
                    percent(row["predicted_share_of_int8"], 1), *milliseconds, gain,
                ]
            )  # fmt: skip
        print_table(
            "Plans at 88 % of the multiply-accumulate estimate, batch 1",
            [
                "network", "parameters", "s to score", "pairs alone/unfused/best", "the same, every 4th layer float32",
                "predicted % of int8", "ms best", "ms unfused", "ms each alone", "ms int8", "fused is faster by",
            ],
            lines,
            machine_caption(self.file.machine),
        )  # fmt: skip

    def rankings(self) -> None:
        extra = self.options.extra
        for name in extra.structures:
            for budget, values in RANKING_BUDGETS.items():
                settings = {"size": extra.size, "images": extra.ranking_images, "budget": values}
                row = self.row(
                    f"rankings.{name}, {budget}",
                    listed(settings),
                    lambda n=name, v=values: measure_rankings(n, extra.size, extra.ranking_images, v, Progress(n)),
                )
                lines = []
                for method, r in row["rows"].items():
                    lines.append(
                        [
                            method, f"{r['rank_seconds']:.1f}" if r["rank_seconds"] else "-",
                            " ".join(f"{n} {p}" for p, n in r["layers"].items()), percent(r["lowest_share_of_macs"], 0),
                            percent(r["same_as_n_runs"], 0), "/".join(str(n) for n in r["pairs"].values()),
                            f"{r['size'] / 1e6:.2f}", f"{1e3 * r['latency']:.2f}" if r["latency"] else "-",
                            f"{r['noise']:.2e}",
                        ]
                    )  # fmt: skip
                print_table(
                    f"{name}, random weights, {budget}, {row['images']} images, batch 1; "
                    f"{row['preparation_seconds']:.1f} s to quantize before ranking",
                    [
                        "ranking", "processor s to rank", "layers", "% of MACs lowest", "% of layers as n runs",
                        "pairs alone/unfused/best", "MB", "ms", "noise at output",
                    ],
                    lines,
                    machine_caption(row["machine"]),
                )  # fmt: skip


def listed(settings: Any) -> Any:
    """Tuples as lists, as they come back from JSON."""
    if isinstance(settings, dict):
        return {name: listed(value) for name, value in settings.items()}
    return list(settings) if isinstance(settings, tuple) else settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("layerwise", __doc__, NETWORKS, 2000)
    parser.add_argument("--part", choices=("all", "cost", "accuracy", "structure", "rankings"), default="all")
    parser.add_argument("--widths", type=lambda t: [int(v) for v in t.split(",")], default=list(WIDTHS))
    parser.add_argument("--structures", type=lambda t: t.split(","), default=list(STRUCTURES))
    parser.add_argument("--size", type=int, default=224, help="pictures of --part structure and rankings")
    parser.add_argument("--ranking-images", type=int, default=32, help="of --part rankings (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument(
        "--validation", type=int, default=1000, help="images of the n-run search (default: %(default)s)"
    )
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "layerwise.svg", help="plot of --part cost")
    options = read_options(parser, arguments, NETWORKS)
    run = Run(options)
    if options.extra.part in ("all", "cost"):
        run.cost()
    if options.extra.part in ("all", "structure"):
        run.structure()
    if options.extra.part in ("all", "rankings"):
        run.rankings()
    if options.extra.part in ("all", "accuracy"):
        data_folder()
        run.accuracy()


if __name__ == "__main__":
    run_command(main)
