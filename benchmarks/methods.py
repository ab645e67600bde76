"""Published methods beside bitdial on the same ground: accuracy at average widths of 4, 5, 6 and 8 bits.

Same network, same 8-bit start, same calibration images, first and last layers at 8 bits and the same bias correction for
all; every accuracy is that of the integer-exact reference engine (see `measure`), but for rows that say "simulated": no engine
makes their narrow numbers, which are read back onto the 8-bit grid and then run through its steps. Methods that train get the
same epochs of the same images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bitdial.errors import BitdialError, ConfigError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import SampledBatches, flip_and_crop
from bitdial.pipeline import Prepared, prepare
from bitdial.quantization.config import QuantizeConfig
from bitdial.zoo.datasets import load_dataset
from common import (
    CALIBRATION_IMAGES,
    NETWORKS,
    Options,
    Progress,
    data_folder,
    machine_caption,
    make_parser,
    note,
    open_results,
    print_table,
    read_options,
    run_command,
    test_images,
)
from comparison import Ground, Settings, Training
from comparison.methods import Built, build_all, get_method
from finetuning import ORDER_SEED, VALIDATION
from machine import describe_machine
from measure import Samples, TestBench, pack_flags, paired_difference
from methods_rows import AVERAGES, Row, all_rows, choose_rows, seeded
from methods_table import HEAD, REFERENCES, WHOLE_WIDTHS, float_rows, gap_rows, markdown, table_rows
from real_networks_data import LITE0
from real_networks_data import NETWORKS as REAL
from results import read_rows

SHOWN = ("resnet20", "vgg", "vit")
KNOWN = (*NETWORKS, LITE0.name)
PHOTOGRAPHS = 32  # in a batch


class NetworkRun:
    """The rows of one network; images, float outputs and preparations are made when a row first needs them."""

    def __init__(self, network: str, options: Options) -> None:
        self.network, self.options, self.source = network, options, REAL[network]
        self.cifar = network in NETWORKS
        self.file = open_results(options, f"methods.{network}", "methods")
        self.weights = self.source.digest()
        self._bench: TestBench | None = None
        self._ground: tuple[int, Ground] | None = None

    def settings(self, row: Row | None, seed: int = 0) -> dict[str, Any]:
        """What a row's figures depend on. None: the float network."""
        common: dict[str, Any] = {"network": self.network, "weights": self.weights, "images": self.options.images}
        if row is None:
            return common
        extra = self.options.extra
        training = {}
        if row.trained:
            finetune = self.finetune(seed).model_dump(mode="json", exclude={"device", "checkpoint_seconds"})
            training = {"finetune": finetune, "train_images": extra.train_images}
        return {
            **common,
            "method": row.method,
            "settings": asdict(Settings(**row.settings)),
            "config": self.config(seed).model_dump(mode="json"),
            "averages": list(self.averages(row)),
            "calibration_images": self.source.calibration,
            "labels": extra.labels if self.cifar else "own",
            "seed": seed,
            **training,
        }

    def config(self, seed: int) -> QuantizeConfig:
        return self.options.config(seed=seed)

    def averages(self, row: Row) -> tuple[float, ...]:
        return tuple(b for b in self.options.extra.averages if get_method(row.method).supports(b))

    def finetune(self, seed: int) -> FinetuneConfig:
        """Epochs, rate and losses of all methods that train."""
        extra = self.options.extra
        return FinetuneConfig(
            epochs=extra.epochs, batch_size=extra.batch_size, learning_rate=extra.learning_rate,
            cross_entropy=extra.cross_entropy, distillation=extra.distillation, seed=seed, device="cpu",
        )  # fmt: skip

    def training(self, seed: int) -> Training | None:
        """Training data: the images that `finetuning.py` trains on. Nobody has validation data: the last state counts."""
        if not self.options.extra.epochs or not self.cifar:
            return None
        images = load_dataset(data_folder() / "cifar10", "train").shuffled(ORDER_SEED)
        config = self.finetune(seed)
        n = self.options.extra.train_images or len(images) - VALIDATION
        batches = SampledBatches(n, images.tensors, config.batch_size, seed, flip_and_crop)
        return Training(config, batches)

    def bench(self) -> TestBench:
        if self._bench is None:
            images: Any = test_images(self.options.images) if self.cifar else self.photographs()
            self._bench = TestBench(self.source.load(), images)
        return self._bench

    def photographs(self) -> Samples:
        (pixels,), score = self.source.tests(self.options.images)
        return Samples(pixels, score.labels, PHOTOGRAPHS)

    def calibrated(self, seed: int, progress: Progress) -> tuple[Prepared, Any]:
        """(the prepared network, labels of its calibration images or None). Photographs are the same for every seed."""
        if self.cifar:
            images = load_dataset(data_folder() / "cifar10", "train").calibration_subset(CALIBRATION_IMAGES, seed)
            inputs, labels = [images.array()], images.labels if self.options.extra.labels == "data" else None
        else:
            inputs, labels = self.source.samples(self.source.calibration), None
        samples = [torch.from_numpy(x) for x in inputs]
        return prepare(self.source.load(), samples, self.config(seed), progress=progress), labels

    def ground(self, seed: int, progress: Progress) -> Ground:
        """The common start of a seed: calibration images drawn by it, its labels, the prepared network."""
        if self._ground is None or self._ground[0] != seed:
            prepared, labels = self.calibrated(seed, progress)
            self._ground = seed, Ground(prepared, self.config(seed), labels, self.training(seed), progress)
        ground = self._ground[1]
        ground.progress = progress
        return ground

    def measure_float(self) -> None:
        progress = Progress(f"{self.network} float32")
        row, now = self.file.measure(
            "float32", self.settings(None), lambda: self.bench().float_figures(progress), changed=self.options.changed
        )
        if now:
            progress.done(f"{100 * row['accuracy']:.2f} %")

    def measure_row(self, row: Row, seed: int) -> None:
        """Build and evaluate, unless the file has the row."""
        settings = self.settings(row, seed)
        name = seeded(row.name, seed)
        if self.file.find(name, settings, changed=self.options.changed) is not None:
            return
        progress = Progress(f"{self.network} {name}")
        ground = self.ground(seed, progress)
        built = build_all(row.method, ground, self.averages(row), Settings(**row.settings))
        started = time.perf_counter()
        figures = self.figures(built, progress)
        evaluation = time.perf_counter() - started
        self.file.put(name, settings, {**figures, "seed": seed, "evaluation_seconds": evaluation})
        shown = ", ".join(f"{p['asked']:g} bits: {100 * p['accuracy']:.2f}" for p in figures["points"])
        progress.done(f"{shown} ({built.seconds:.0f} s to prepare, {evaluation:.0f} s to evaluate)")

    def figures(self, built: Built, progress: Progress) -> dict[str, Any]:
        """Accuracy of every point, paired to float, and what switching costs."""
        bench = self.bench()
        right = bench.correct(bench.float_outputs(progress))
        points = []
        for point in built.points:
            correct = bench.correct(bench.outputs(point.program, point.ratio, progress, point.engine)[0])
            gap, error = paired_difference(correct, right)
            share = float(correct.mean())
            points.append(
                {
                    "asked": point.asked,
                    "reached": point.reached,
                    "accuracy": share,
                    "standard_error": (share * (1 - share) / len(correct)) ** 0.5,
                    "to_float": gap,
                    "to_float_standard_error": error,
                    "correct": pack_flags(correct),
                    **({} if point.engine is None else {"simulated": True}),
                }
            )
        return {
            "points": points,
            "samples": len(right),
            "prepare_seconds": built.seconds,
            "switching": built.switching.as_json(),
            "details": built.details,
        }


def stored(options: Options) -> dict[str, dict[str, dict[str, Any]]]:
    """Network -> rows of the result files of this machine's kind."""
    kind = describe_machine()["kind"]
    found = {}
    for network in options.networks:
        path = options.results / f"methods.{network}.{kind}.json"
        if path.exists():
            found[network] = read_rows(path, "methods")
    return found


def note_of(rows: dict[str, dict[str, Any]]) -> str:
    """Images, seeds and machine behind the rows."""
    samples = sorted({int(row["samples"]) for row in rows.values()})
    seeds = sorted({int(row["seed"]) for row in rows.values() if "seed" in row})
    machine = next(iter(rows.values()))["machine"]
    counts = ", ".join(f"{n:,}" for n in samples)
    measured = f"{counts} test images; seeds {', '.join(map(str, seeds)) or 'none'}; {machine_caption(machine)}"
    return f"{measured}. {WHOLE_WIDTHS}"


def show(options: Options, seeds: Sequence[int]) -> None:
    networks = stored(options)
    if not networks:
        raise BitdialError("there are no results to show yet; run without --markdown first")
    for network, rows in networks.items():
        if options.extra.markdown:
            sys.stdout.write(markdown(network, rows, seeds, note_of(rows)) + "\n")
            continue
        print_table(f"{network}: top-1 accuracy, %, at average widths", HEAD, table_rows(rows, seeds), note_of(rows))
        widths = ["method", *HEAD[1 : 1 + len(AVERAGES)]]
        print_table(f"{network}: difference to float32, points", widths, float_rows(rows, seeds))
        for reference in REFERENCES:
            gaps = gap_rows(rows, seeds, reference)
            if gaps:
                print_table(f"{network}: {reference} minus each method, points", widths, gaps)


def list_rows() -> None:
    rows = [
        [row.name, row.label, get_method(row.method).source, "trains" if row.trained else ""] for row in all_rows()
    ]
    print_table("Rows, in the order of work", ["row", "method", "source", ""], rows)


def averages(text: str | None) -> tuple[float, ...]:
    """The average widths asked for. Raises ConfigError."""
    if text is None:
        return AVERAGES
    known = {f"{b:g}": b for b in AVERAGES}
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in known]
    if unknown or not wanted:
        raise ConfigError(f"--averages: {', '.join(unknown) or 'nothing'} is not among {', '.join(known)}")
    return tuple(b for name, b in known.items() if name in wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables. Raises BitdialError."""
    parser = make_parser("methods", __doc__, SHOWN, None)
    parser.add_argument("--rows", help="comma-separated names (default: all; those that train only with --epochs)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of calibration, selection, training (default: 3)")
    parser.add_argument("--averages", help="comma-separated average widths (default: 4,5,6,8); recorded in the row")
    parser.add_argument("--epochs", type=int, default=0, help="of training, for the methods that train (default: 0)")
    parser.add_argument("--train-images", type=int, help=f"images of an epoch (default: all but {VALIDATION})")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=FinetuneConfig().learning_rate)
    parser.add_argument("--cross-entropy", type=float, default=FinetuneConfig().cross_entropy, help="weight in the loss")
    parser.add_argument("--distillation", type=float, default=FinetuneConfig().distillation, help="weight in the loss")
    parser.add_argument(
        "--labels", choices=("data", "own"), default="data",
        help="of the calibration images, for HAWQ and CSMPQ: the data's, or the float network's answers",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--markdown", action="store_true", help="print stored results in Markdown and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of stored results and stop")
    options = read_options(parser, arguments, KNOWN)
    extra = options.extra
    extra.averages = averages(extra.averages)
    for name in ("seeds", "train_images"):
        value = getattr(extra, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if extra.epochs < 0:
        raise ConfigError(f"--epochs is {extra.epochs}; give 0 or more")
    if extra.list:
        list_rows()
        return
    seeds = range(extra.seeds)
    if not (extra.markdown or extra.table):
        rows = choose_rows(extra.rows, extra.epochs > 0)
        data_folder()
        for network in options.networks:
            if reason := REAL[network].missing():
                note(f"NETWORK SKIPPED: {network}: {reason}")
                continue
            run = NetworkRun(network, options)
            run.measure_float()
            for seed in seeds:
                for row in rows if run.cifar else [row for row in rows if not row.trained]:
                    run.measure_row(row, seed)
    show(options, seeds)


__all__ = ["NetworkRun", "main"]

if __name__ == "__main__":
    run_command(main)
