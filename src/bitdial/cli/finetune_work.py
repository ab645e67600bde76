"""The steps of `bitdial finetune`: data parts, the start, training that Ctrl-C interrupts without loss, curves of both."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from bitdial.api import QuantizedModel, prepare_model
from bitdial.artifact import load_program, save_program
from bitdial.cli import machine
from bitdial.cli.data import Batches, DataOptions, check_fit, name_sources
from bitdial.cli.terminal import Terminal, percent, ratio_name
from bitdial.errors import ArtifactError, DataError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, SampledBatches, flip_and_crop
from bitdial.finetuning.trainer import Interrupted
from bitdial.pipeline import Prepared, quantize_prepared
from bitdial.pipeline.effort import tuning_checkpoint
from bitdial.pipeline.finetuning import Finetuned, finetune_prepared
from bitdial.pipeline.start import check_start
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.report.collect import low_share_of_all
from bitdial.zoo.datasets import FloatImages, ImageSet

if TYPE_CHECKING:
    from torch import nn

Row = dict[str, Any]
VALIDATION_SHARE, VALIDATION_MOST = 0.05, 2000


@dataclass(frozen=True)
class Parts:
    """What the train part of the data is used for. Calibration images are training images too, validation images neither."""

    calibration: ImageSet
    training: ImageSet
    validation: ImageSet
    augmented: bool

    @property
    def classes(self) -> int:
        return self.training.num_classes


def split_train(
    train: ImageSet, calibration: int, seed: int, held: int | None, limit: int | None, augment: bool | None
) -> Parts:
    """Calibration images first, as `bitdial quantize` draws them; validation images from the other end of the same order.

    held: number of validation images (None: 5 %, at most 2000). limit: most training images. Raises DataError.
    """
    order = train.shuffled(seed)
    if held is None:
        held = min(VALIDATION_MOST, int(VALIDATION_SHARE * len(train)), len(train) - calibration)
    left = len(train) - max(0, held)
    if left < max(1, calibration):
        raise DataError(
            f"{train.name} has {len(train)} train images: too few for {held} validation images beside {calibration} for "
            "calibration and training; ask for fewer with --validation-images"
        )
    rest = order.subset(np.arange(left)).head(limit)
    natural = not isinstance(train.source, FloatImages) and train.image_shape[0] == 3
    return Parts(
        train.calibration_subset(calibration, seed),
        rest,
        order.subset(np.arange(left, len(train))),
        natural if augment is None else augment,
    )


def check_classes(program: Program, images: ImageSet) -> None:
    """Raise DataError unless the data have as many classes as the network tells apart (see also `check_fit`).

    Fewer are let pass where the classes are bare numbers: labels then mean what they say, whatever is missing.
    """
    check_fit(program, images)
    shape = program.types[program.outputs[0]].shape
    classes = shape[-1]
    numbered = images.classes == [str(i) for i in range(images.num_classes)]
    if isinstance(classes, int) and images.num_classes < classes and not numbered:
        raise DataError(
            f"{images.name} has {images.num_classes} classes, the network tells {classes} apart: their numbers would not be "
            "those it was trained with; give the data it was trained for, or a folder for every class"
        )


class HeldOut(Sequence[Batch]):
    """Validation batches, read anew whenever they are asked for."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.size
        pixels, labels = self.images.tensors(torch.arange(start, min(start + self.size, len(self.images))))
        return [pixels], labels


@contextlib.contextmanager
def stopping(terminal: Terminal) -> Iterator[Callable[[], bool]]:
    """What tells the trainer to stop: the first Ctrl-C. The second raises KeyboardInterrupt at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        terminal.note("stopping after this update; Ctrl-C again stops at once")

    try:
        former = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone may set handlers
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, former)


@dataclass
class Work:
    """One `bitdial finetune`.

    start: as read from MODEL.bitdial, None where the network is quantized first. config: of the quantization. given, stored:
    data options, and provenance["source"] of the start.
    """

    terminal: Terminal
    spec: str
    weights: Path | None
    config: QuantizeConfig
    settings: FinetuneConfig
    given: DataOptions
    output: Path
    start: Program | None = None
    start_name: str = ""
    stored: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.output.with_name(self.output.name + ".finetune.ckpt")

    @property
    def search(self) -> Path:
        return self.output.with_name(self.output.name + ".search.json")

    @property
    def kept_start(self) -> Path:
        """The model quantized first, so that a resumed run need not search again."""
        return self.output.with_name(self.output.name + ".finetune.start")

    def forget(self) -> None:
        """Remove what an interrupted run left."""
        for path in (self.checkpoint, self.search, tuning_checkpoint(self.search), self.kept_start):
            path.unlink(missing_ok=True)

    def begin(self, network: nn.Module, parts: Parts) -> tuple[Prepared, Program]:
        """The network captured, calibrated and laid out, and the quantized program that training starts from."""
        calibration = torch.from_numpy(parts.calibration.array())
        self.terminal.interrupted = lambda: (
            f"stopped; the search is kept in {self.search}: the same command goes on from there"
            if self.search.exists()
            else "stopped before training; nothing was written"
        )
        with torch.autocast("cpu", enabled=False), self.terminal.progress() as progress:
            prepared = prepare_model(network, calibration, self.config, progress=progress)
            if self.start is not None:
                check_start(self.start, prepared, self.config, self.start_name)
                return prepared, self.start
            program = self._kept(prepared)
            if program is None:
                program = quantize_prepared(prepared, self.config, progress=progress, checkpoint=self.search)
                name_sources(program, self.spec, self.weights, self.given)
                save_program(program, self.kept_start)
                self.search.unlink(missing_ok=True)
                tuning_checkpoint(self.search).unlink(missing_ok=True)
        return prepared, program

    def _kept(self, prepared: Prepared) -> Program | None:
        """The model that an interrupted run of these settings, weights and images had quantized; None if there is none."""
        if not self.kept_start.exists():
            return None
        try:
            program = load_program(self.kept_start)
            if program.provenance.get("config") != self.config.model_dump(mode="json"):
                return None
            check_start(program, prepared, self.config, str(self.kept_start))
        except (ArtifactError, DataError):
            return None
        self.terminal.note(f"note: going on with the quantized model in {self.kept_start}")
        return program

    def train(self, prepared: Prepared, program: Program, parts: Parts) -> Finetuned:
        """Train. The first Ctrl-C writes the checkpoint and ends the command with code 130."""
        batches = SampledBatches(
            len(parts.training),
            parts.training.tensors,
            self.settings.batch_size,
            self.settings.seed,
            flip_and_crop if parts.augmented else None,
        )
        if self.checkpoint.exists():
            self.terminal.note(f"note: going on with the training in {self.checkpoint}")
        self.terminal.interrupted = lambda: (
            f"stopped; {self.checkpoint} keeps the training: the same command goes on from there, --no-resume starts anew"
            if self.checkpoint.exists()
            else "stopped before the training had anything to keep; nothing was written"
        )
        held = HeldOut(parts.validation, max(self.settings.batch_size, 100))
        with stopping(self.terminal) as stop, self.terminal.training() as training:
            try:
                return finetune_prepared(
                    prepared, program, self.config, self.settings, batches, validation=held, progress=training,
                    checkpoint=self.checkpoint, stop=stop,
                )  # fmt: skip
            except Interrupted as error:
                raise KeyboardInterrupt from error

    def describe(self, program: Program, done: Finetuned, parts: Parts) -> None:
        """Add to the provenance what the trainer does not know."""
        provenance = program.provenance["finetuning"]
        provenance["cpu"] = machine.cpu_model()
        provenance["device"] = self.settings.torch_device
        provenance["bfloat16"] = self.settings.bfloat16
        provenance["threads"] = torch.get_num_threads()
        provenance["data"] = {
            **self.given.describe(self.stored),
            "training": len(parts.training),
            "validation": len(parts.validation),
            "augmented": parts.augmented,
        }
        provenance["seconds"]["total"] = done.seconds
        program.provenance.pop("evaluation", None)  # it was of the start

    def compare(self, network: nn.Module, before: Program, after: Program, test: ImageSet, record: Row) -> None:
        """The curves of both and the float network's accuracy on the test images, into the provenance and curve of `after`.
        record: what was measured on."""
        batches = Batches(test, 100)
        with self.terminal.progress() as progress:
            old, old_hits = _measure(before, batches, lambda share: progress("measuring the curve before", share))
            new, new_hits = _measure(after, batches, lambda share: progress("measuring the curve after", share))
            right = 0
            for number, (pixels, labels) in enumerate(batches):
                with torch.no_grad():
                    right += int((network(pixels).argmax(-1) == labels).sum())
                progress("measuring the float network", (number + 1) / len(batches))
        share = right / len(test)
        error = math.sqrt(share * (1 - share) / len(test))
        float_row: Row = {"label": "float32", "ratio": None, "low_share": 0.0}
        float_row |= {"accuracy": share, "standard_error": error, "samples": len(test)}
        differences = []
        for ratio, was, now in zip(after.ratios, old_hits, new_hits, strict=True):
            change = now - was
            own = float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else None
            differences.append({"ratio": ratio, "difference": float(change.mean()), "standard_error": own})
        after.curve = new
        after.provenance["evaluation"] = {**record, "baselines": [float_row]}
        after.provenance["finetuning"] |= {"before": old, "differences": differences}

    def print_result(self, program: Program, done: Finetuned, parts: Parts) -> None:
        """What came of it: the table, and whatever should not be overlooked."""
        provenance = program.provenance["finetuning"]
        rows = [
            [
                f"ratio {ratio_name(new['ratio'])}" + (" (8-bit)" if new["ratio"] == 0.0 else ""),
                percent(old["accuracy"]),
                percent(new["accuracy"]),
                f"{100 * change['difference']:+.2f}",
                "-" if change["standard_error"] is None else f"{100 * change['standard_error']:.2f}",
            ]
            for old, new, change in zip(
                provenance.get("before", ()), program.curve, provenance.get("differences", ()), strict=False
            )
        ]
        if rows:
            evaluation = program.provenance["evaluation"]
            base = evaluation["baselines"][0]
            rows.append(["float32", percent(base["accuracy"]), "", "", ""])
            title = f"{self.spec} on {evaluation['images']} test images of {evaluation['data']}"
            columns = ["setting", "before", "after", "difference, points", "std. error of it"]
            self.terminal.table(columns, rows, title)
        for text in warnings_of(program, len(parts.validation)):
            self.terminal.note(f"note: {text}")


def warnings_of(program: Program, validation: int) -> list[str]:
    """What a user should not overlook in a finetuned model."""
    provenance = program.provenance["finetuning"]
    told = []
    if provenance["stopped"]:
        kept = f"the state after update {provenance['best_update']} is kept"
        told.append(f"training ended early: {provenance['stopped']}; {kept}")
    elif validation and provenance["best_update"] == 0:
        told.append(
            "no later state was as good on the validation images as the start, which is kept: a smaller --learning-rate or more "
            "epochs may help, or --keep last where the network was trained on these images"
        )
    first = next((row["accuracies"] for row in provenance["evaluations"] if row["accuracies"]), None)
    shape = program.types[program.outputs[0]].shape[-1]
    if first and isinstance(shape, int) and first[0] < 2.0 / shape:
        told.append(
            f"before training only {percent(first[0], 1)} of the validation images were right at 8 bits, about what guessing "
            "gives: are classes and preprocessing those of the network?"
        )
    return told


def _measure(
    program: Program, batches: Batches, progress: Callable[[float], None]
) -> tuple[list[Row], list[np.ndarray[Any, np.dtype[np.float64]]]]:
    """(curve, per ratio whether each image was right), from one pass over the images."""
    model = QuantizedModel(program)
    hits: list[list[np.ndarray[Any, np.dtype[np.float64]]]] = [[] for _ in program.ratios]
    calls = 0

    def metric(outputs: Any, targets: Any) -> float:
        nonlocal calls
        right = (torch.as_tensor(outputs).argmax(dim=-1) == torch.as_tensor(targets)).double()
        hits[calls % len(hits)].append(right.numpy())  # ratios take turns, in the order of the table
        calls += 1
        return float(right.mean())

    rows = model.evaluate(batches, metric=metric, progress=progress)
    for index, row in enumerate(rows):
        row["low_share"] = low_share_of_all(program, index)
    return rows, [np.concatenate(parts) for parts in hits]
