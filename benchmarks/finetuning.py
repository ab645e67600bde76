"""What finetuning buys at every ratio, what each of its parts is worth, and what a step of it costs.

Every accuracy is that of the integer-exact reference engine on the test images (see `measure`); training sees the training
images only. The networks were trained on the same images, so the held-out part that chooses the best state is held out of
finetuning alone. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accuracy_table import entry
from bitdial.errors import ConfigError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, SampledBatches, flip_and_crop
from bitdial.finetuning.kernels import without_kernels
from bitdial.finetuning.loss import FloatTeacher, loss
from bitdial.finetuning.trainer import TrainingProgress
from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.pipeline.finetuning import Finetuned, finetune_prepared, make_network, reselect
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.zoo.datasets import load_dataset
from common import (
    CALIBRATION_IMAGES,
    NETWORKS,
    Options,
    Progress,
    calibration_images,
    data_folder,
    file_digest,
    machine_caption,
    make_parser,
    open_results,
    print_table,
    read_options,
    run_command,
    test_images,
    trained_network,
    weights_file,
)
from machine import describe_machine
from measure import TestBench
from results import read_rows, settings_hash

DEFAULT_NETWORKS = ("resnet20", "vgg", "vit")
VALIDATION = 1000
ORDER_SEED = 1  # of the training images before they are parted

# What differs from the default in each variant; "reselect" is the default's training with one more step.
VARIANTS: dict[str, dict[str, Any]] = {
    "dual": {},
    "mostly distillation": {"cross_entropy": 0.25, "distillation": 1.0},
    "best on held-out images": {"keep": "best"},
    "low only": {"passes": "low"},
    "no distillation": {"distillation": 0.0},
    "no cross-entropy": {"cross_entropy": 0.0},
    "8-bit teacher": {"teacher": "8bit"},
    "highest only": {"low_ratio": "highest"},
    "sampled": {"passes": "sampled"},
    "learned scales": {"scales": "learned"},
    "learned bias": {"bias": "learned"},
    "reestimated": {"batch_norm": "reestimated"},
    "fixed tables": {"rederivations": 0},
}


@dataclass
class Start:
    """A quantized network before training."""

    prepared: Prepared
    program: Program
    config: QuantizeConfig
    seconds: float


class NetworkRun:
    """The rows of one network."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options = network, options
        self.file = open_results(options, f"finetuning.{network}", "finetuning")
        self.weights = file_digest(weights_file(network))
        self.bench = TestBench(trained_network(network), test_images(options.images))
        self.train = load_dataset(data_folder() / "cifar10", "train").shuffled(ORDER_SEED)
        self.starts: dict[int, Start] = {}

    def settings(self, seed: int, finetune: FinetuneConfig | None) -> dict[str, Any]:
        """What a row's figures depend on."""
        common = {
            "network": self.network,
            "weights": self.weights,
            "images": self.options.images,
            "config": self.config(seed).model_dump(mode="json"),
            "calibration_images": CALIBRATION_IMAGES,
        }
        if finetune is None:
            return common
        kept = finetune.model_dump(mode="json", exclude={"device", "checkpoint_seconds"})
        return {**common, "finetune": kept, "train_images": self.options.extra.train_images}

    def config(self, seed: int) -> QuantizeConfig:
        return self.options.config(seed=seed)

    def start(self, seed: int) -> Start:
        if seed not in self.starts:
            progress = Progress(f"{self.network} start {seed}")
            began = time.perf_counter()
            config = self.config(seed)
            prepared = prepare(trained_network(self.network), [calibration_images(seed)], config, progress=progress)
            program = quantize_prepared(prepared, config, progress=progress)
            self.starts = {seed: Start(prepared, program, config, time.perf_counter() - began)}
        return self.starts[seed]

    def measure_start(self, seed: int) -> None:
        name, settings = f"start.s{seed}", self.settings(seed, None)
        if self.file.find(name, settings, changed=self.options.changed) is not None:
            return
        start = self.start(seed)
        figures = self.bench.figures(start.program, start.program.ratios, Progress(f"{self.network} {name}"))
        self.file.put(name, settings, {**figures, "seconds": start.seconds, "float": self.bench.float_figures()})

    def measure(self, variant: str, seed: int) -> None:
        """Train a variant and evaluate it, with and without choosing the groups anew afterwards for the default."""
        extra = self.options.extra
        # The networks know the held-out images by heart: the last state counts.
        changes = {"keep": "last", "epochs": extra.epochs, "batch_size": extra.batch_size, "learning_rate": extra.learning_rate}
        finetune = FinetuneConfig(**{**changes, "seed": seed, "checkpoint_seconds": 60.0, **VARIANTS[variant]})
        name, settings = row_name(variant, finetune), self.settings(seed, finetune)
        if self.file.find(name, settings, changed=self.options.changed) is not None:
            return
        start = self.start(seed)
        checkpoint = self.options.results / f"finetuning.{self.network}.{settings_hash(settings)}.checkpoint.tmp"
        self.options.results.mkdir(parents=True, exist_ok=True)
        progress = Progress(f"{self.network} {name}")
        result = finetune_prepared(
            start.prepared, start.program, start.config, finetune, self.batches(finetune),
            validation=self.validation(), progress=show_training(progress), checkpoint=checkpoint,
        )  # fmt: skip
        figures = self.bench.figures(result.program, result.program.ratios, progress)
        record = result.program.provenance["finetuning"]
        if variant == "dual":
            again = copy.deepcopy(result.program)
            reselect(result.prepared, again, result.config, progress)
            own = self.bench.figures(again, again.ratios, progress)
            self.file.put(
                row_name("dual, groups chosen anew", finetune),
                settings,
                {**own, **cost(result), "training": record},
            )
        self.file.put(name, settings, {**figures, **cost(result), "training": record})
        checkpoint.unlink(missing_ok=True)
        progress.done(", ".join(f"{100 * e['ratio']:.0f} %: {100 * e['accuracy']:.2f}" for e in figures["ratios"]))

    def batches(self, finetune: FinetuneConfig) -> SampledBatches:
        n = self.options.extra.train_images or len(self.train) - VALIDATION
        return SampledBatches(n, self.train.tensors, finetune.batch_size, finetune.seed, flip_and_crop)

    def validation(self) -> list[Batch]:
        first = len(self.train) - VALIDATION
        parts = [self.train.tensors(torch.arange(a, a + 250)) for a in range(first, len(self.train), 250)]
        return [([images], labels) for images, labels in parts]

    def measure_speed(self) -> None:
        """Seconds of a step of a plain float epoch and of every kind of pass, in turns."""
        settings = {
            "network": self.network,
            "threads": torch.get_num_threads(),
            "batch_size": self.options.extra.batch_size,
        }
        if self.file.find("speed", settings, changed=self.options.changed) is None:
            self.file.put(
                "speed",
                settings,
                step_times(self.network, self.start(0), self.options.extra.batch_size, self.train.tensors),
            )


def row_name(variant: str, finetune: FinetuneConfig) -> str:
    """Under which a variant is stored."""
    return f"{variant}, {finetune.epochs} epochs, rate {finetune.learning_rate:g}.s{finetune.seed}"


def show_training(progress: Progress) -> Callable[[TrainingProgress], None]:
    def show(state: TrainingProgress) -> None:
        left = "" if state.remaining is None else f", {state.remaining / 60:.0f} min left"
        progress(
            f"update {state.update} of {state.updates}, loss {state.loss:.3f}{left},", state.update / state.updates
        )

    return show


def cost(result: Finetuned) -> dict[str, Any]:
    record = result.record
    return {
        "seconds": result.seconds,
        "training_seconds": record.training_seconds,
        "derive_seconds": record.derive_seconds,
        "seconds_per_update": record.training_seconds / max(1, record.updates),
        "threads": torch.get_num_threads(),
    }


def step_times(
    network: str, start: Start, batch_size: int, read: Callable[[Tensor], tuple[Tensor, Tensor]], repeats: int = 7
) -> dict[str, Any]:
    """Median seconds of one step (forward, backward, update; augmentation and teacher where training has them)."""
    images, labels = read(torch.arange(batch_size))
    images = images.contiguous(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {}
    for kind in ("float32", "bfloat16"):
        steps[f"float network, {kind}"] = float_step(network, images, labels, kind == "bfloat16")
        finetune = FinetuneConfig(precision=kind)
        dual = dual_step(start, images, labels, finetune)
        steps[f"dual with teacher, {kind}"] = dual
        steps[f"dual with teacher, torch alone, {kind}"] = without_kernels()(dual)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {"seconds": {name: statistics.median(found[1:]) for name, found in times.items()}, "repeats": repeats}


def float_step(network: str, images: Tensor, labels: Tensor, bfloat16: bool) -> Callable[[], None]:
    model = trained_network(network).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def dual_step(start: Start, images: Tensor, labels: Tensor, finetune: FinetuneConfig) -> Callable[[], None]:
    _, twin = make_network(start.prepared, start.program, finetune)
    teacher = FloatTeacher(start.prepared.graph, "cpu", finetune.bfloat16)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-6)
    highest = len(start.program.ratios) - 1

    def step() -> None:
        optimizer.zero_grad()
        taught = teacher([images])
        for index in (0, highest):
            torch.autograd.backward(loss(twin([images], index)[0], labels, taught, finetune))
        optimizer.step()

    return step


def mean_text(rows: dict[str, dict[str, Any]], variant: str, ratio: float) -> str:
    """Mean accuracy over the seeds, in percent, and its standard error where there are several."""
    found = [entry(row, ratio) for name, row in rows.items() if name.rsplit(".s", 1)[0] == variant]
    values = [100 * e["accuracy"] for e in found if e is not None]
    if not values:
        return "-"
    if len(values) == 1:
        own = next(e for e in found if e is not None)
        return f"{values[0]:.2f} ({100 * own['to_float']:+.2f} ± {100 * own['to_float_standard_error']:.2f})"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


def table(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A line per variant: accuracy at every ratio, their mean, minutes per epoch."""
    names = list(dict.fromkeys(name.rsplit(".s", 1)[0] for name in rows if ".s" in name))
    known = list(dict.fromkeys(("start", "dual", "dual, groups chosen anew", *VARIANTS)))

    def order(name: str) -> tuple[bool, str, int]:
        variant = max((v for v in known if name == v or name.startswith(f"{v}, ")), key=len)
        return name != "start", name[len(variant) :], known.index(variant)

    names.sort(key=order)
    lines = []
    for variant in names:
        own = [row for name, row in rows.items() if name.rsplit(".s", 1)[0] == variant and "ratios" in row]
        if not own:
            continue
        means = [100 * float(np.mean([e["accuracy"] for e in row["ratios"]])) for row in own]
        minutes = "-"
        if "training" in own[0]:
            done = [
                row["seconds_per_update"] * row["training"]["updates"] / row["training"]["config"]["epochs"]
                for row in own
            ]
            minutes = f"{np.mean(done) / 60:.1f}"
        lines.append(
            [variant, str(len(own)), *(mean_text(rows, variant, r) for r in (0.0, 0.25, 0.5, 0.75, 1.0)),
             f"{np.mean(means):.2f}", minutes]
        )  # fmt: skip
    return lines


def show(options: Options) -> None:
    kind = describe_machine()["kind"]
    columns = ["training", "seeds", "0 %", "25 %", "50 %", "75 %", "100 %", "mean", "min/epoch"]
    for network in options.networks:
        path = options.results / f"finetuning.{network}.{kind}.json"
        if not path.exists():
            continue
        rows = read_rows(path, "finetuning")
        exact = next((row["float"] for row in rows.values() if "float" in row), None)
        caption = (
            "" if exact is None else f"float32: {100 * exact['accuracy']:.2f}; in brackets: difference to it, paired. "
        )
        caption += machine_caption(next(iter(rows.values()))["machine"])
        if options.extra.markdown:
            lines = [columns, ["---"] * len(columns), *table(rows)]
            sys.stdout.write(
                f"**{network}** ({caption})\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
            )
        else:
            print_table(f"{network}: top-1 accuracy, %", columns, table(rows), caption)
        if "speed" in rows:
            times = rows["speed"]["seconds"]
            plain = {kind: times[f"float network, {kind}"] for kind in ("float32", "bfloat16")}
            shown = [[n, f"{1000 * s:.0f}", f"{s / plain[n.split(', ')[-1]]:.2f}"] for n, s in times.items()]
            threads = rows["speed"]["settings"]["threads"]
            print_table(f"{network}: one step, {threads} threads", ["step", "ms", "over float"], shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("finetuning", __doc__, DEFAULT_NETWORKS, None)
    parser.add_argument("--variants", default="dual", help=f"comma-separated, or all: {', '.join(VARIANTS)}")
    parser.add_argument("--epochs", type=int, default=FinetuneConfig().epochs)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=FinetuneConfig().learning_rate)
    parser.add_argument("--train-images", type=int, help=f"images of an epoch (default: all but {VALIDATION})")
    parser.add_argument("--seeds", default="0", help="comma-separated; of calibration, selection and training")
    parser.add_argument("--speed", action="store_true", help="measure the time of steps instead of training")
    parser.add_argument("--table", action="store_true", help="print the tables of stored results and stop")
    parser.add_argument("--markdown", action="store_true", help="as --table, in Markdown")
    parser.set_defaults(population=20, generations=10)  # of the start's search: training moves the weights it was for
    options = read_options(parser, arguments, NETWORKS)
    extra = options.extra
    variants = list(VARIANTS) if extra.variants == "all" else [v.strip() for v in extra.variants.split(",")]
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown:
        raise ConfigError(f"--variants: {', '.join(unknown)} is not among {', '.join(VARIANTS)}")
    try:
        seeds = [int(s) for s in extra.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {extra.seeds}: give integers separated by commas") from None
    if not (extra.table or extra.markdown):
        for network in options.networks:
            run = NetworkRun(network, options)
            if extra.speed:
                run.measure_speed()
                continue
            for seed in seeds:
                run.measure_start(seed)
                for variant in variants:
                    run.measure(variant, seed)
    show(options)


if __name__ == "__main__":
    run_command(main)
