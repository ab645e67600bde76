"""`bitdial quantize`: from a trained network, of PyTorch or in an ONNX file, and pictures to one .bitdial file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bitdial.cli import files, machine, options, reading
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, duration, percent, ratio_name, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from bitdial.api import QuantizedModel
    from bitdial.cli.data import DataOptions
    from bitdial.quantization.config import QuantizeConfig
    from bitdial.zoo.datasets import ImageSet

_SEARCH, _EVALUATION = "Search", options.EVALUATION_PANEL


@command
def quantize(
    *,
    model: options.NetworkSpec,
    output: options.ModelOutput,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    data: options.Data,
    settings: Annotated[Given, options_of("bitdial.quantization.config:QuantizeConfig")],
    band: Annotated[
        str | None,
        option(
            "--band", "LOW..HIGH", "Keep only these ratios in the file; what is low at all of them is stored packed.", "Precision"
        ),
    ] = None,
    independent: Annotated[bool, option("--independent", "", "Choose each ratio alone, without nesting.", _SEARCH)] = False,
    resume: Annotated[
        bool,
        option(
            "--resume/--no-resume", "",
            "Go on with an interrupted search or tuning of the same settings; OUT.bitdial.search.json keeps it.", _SEARCH,
        ),
    ] = True,
    evaluate: Annotated[
        bool | None,
        option(
            "--evaluate/--no-evaluate", "",
            "Measure the curve and its baselines on the test part, and keep them. Default: if there is one.", _EVALUATION,
        ),
    ] = None,
    eval_images: options.EvalImages = 1000,
    naive: Annotated[
        bool, option("--naive/--no-naive", "", "Also measure naive extraction, the baseline.", _EVALUATION)
    ] = True,
    report: options.Report = None,
    threads: options.Threads = None,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Quantize a trained network once; the file it writes runs at any setting of its dial.

    Calibration and search use the train part of the data, evaluation the test part. Ctrl-C during the search loses
    nothing: the same command goes on where it stopped.
    """
    started = time.perf_counter()
    if "data" not in data:
        raise ConfigError(
            "quantize needs --data: pictures like those the network will see. Random numbers would give a model "
            "that looks quantized and is not accurate"
        )
    files.check_output(output, force)
    if report is not None:
        from bitdial.cli.report import check_report

        check_report(report)
    from bitdial.quantization.config import QuantizeConfig

    config = QuantizeConfig(**settings, nested=not independent)
    kept = check_band(band, config)
    machine.set_threads(threads)
    from bitdial.cli.data import DataOptions

    given = DataOptions(**data)
    task = Task(terminal, config, given, model, weights)
    network, calibration, test = task.load(num_classes, settings.get("calibration_images"), evaluate, eval_images)
    from bitdial.pipeline.effort import tuning_checkpoint

    checkpoint = output.with_name(output.name + ".search.json")
    tuning = tuning_checkpoint(checkpoint)
    if not resume:
        _forget(checkpoint, tuning)
    elif checkpoint.exists():
        terminal.note(f"note: going on with the search in {checkpoint}")
    if tuning.exists():
        terminal.note(f"note: going on with the tuning in {tuning}")
    terminal.interrupted = lambda: (
        f"stopped; {_what(tuning)} is kept in {tuning if tuning.exists() else checkpoint}: the same command goes on from "
        "there, --no-resume starts anew"
        if checkpoint.exists() or tuning.exists()
        else "stopped before the search had anything to keep; nothing was written"
    )
    quantized = task.quantize(network, calibration, checkpoint)
    naive_on = calibration if naive and config.extraction != "naive" else None
    baselines = task.measure(quantized, network, test, naive_on) if test is not None else []
    summary = quantized.save(output, band=kept)
    _forget(checkpoint, tuning)
    terminal.interrupted = lambda: f"stopped; {output} is written"
    task.print_result(quantized, baselines, output, summary, kept)
    written = task.write_report(output, report, test) if report is not None else []
    for path in written:
        terminal.say(f"wrote {path}")
    seconds = time.perf_counter() - started
    terminal.say(f"took {duration(seconds)}")
    terminal.emit(
        {
            "command": "quantize",
            "output": str(output),
            "sizes": {k: v for k, v in vars(summary).items() if k != "path"},
            "band": kept,
            "curve": quantized.program.curve,
            "baselines": baselines,
            "low_share": {ratio_name(r): task.share(quantized, i) for i, r in enumerate(quantized.ratios)},
            "evaluation": {k: v for k, v in task.evaluation.items() if k != "baselines"},
            "answers": quantized.program.provenance.get("answers"),
            "search": quantized.program.provenance["search"],
            **{k: v for k, v in quantized.program.provenance.items() if k == "effort"},
            "warnings": quantized.program.provenance.get("warnings", []),
            "report": [str(path) for path in written],
            "seconds": seconds,
        }
    )


def _what(tuning: Path) -> str:
    return "the tuning" if tuning.exists() else "the search"


def _forget(*checkpoints: Path) -> None:
    for path in checkpoints:
        path.unlink(missing_ok=True)


def check_band(text: str | None, config: QuantizeConfig) -> tuple[float, float] | None:
    """The band, if it holds a ratio of the config; found out now, not after the search."""
    if text is None:
        return None
    low, high = reading.parse_band(text)
    if not any(low - 1e-9 <= ratio <= high + 1e-9 for ratio in config.ratios):
        have = ", ".join(f"{100 * r:.4g}" for r in config.ratios)
        raise ConfigError(f"--band {text} contains none of the ratios {have} %: widen it, or add one to --ratios")
    return low, high


@dataclass
class Task:
    """The steps of one `bitdial quantize`."""

    terminal: Terminal
    config: QuantizeConfig
    given: DataOptions
    spec: str
    weights: Path | None

    def __post_init__(self) -> None:
        self.evaluation: dict[str, Any] = {}

    def load(
        self, num_classes: int | None, images: int | None, evaluate: bool | None, eval_images: int
    ) -> tuple[torch.nn.Module, torch.Tensor, ImageSet | None]:
        """The network, calibration images [n, C, H, W] of the train part, and test images (None: no evaluation)."""
        import torch

        from bitdial.zoo.registry import build_model

        network = build_model(self.spec, self.weights, num_classes)
        if self.weights is None and self.spec.startswith(("zoo:", "torchvision:", "timm:")):
            self.terminal.note(f"note: {self.spec} without --weights has random weights; accuracies will say nothing")
        train = self.given.load("train")
        if images is None and len(train) < self.config.calibration_images:
            self.terminal.note(f"note: {train.name} has {len(train)} train images; all are used for calibration")
        n = images if images is not None else min(self.config.calibration_images, len(train))
        chosen = train.calibration_subset(n, self.config.seed)
        test, self.evaluation = self.given.test_images(evaluate, eval_images, self.config.seed, self.terminal)
        return network, torch.from_numpy(chosen.array()), test

    def quantize(self, network: torch.nn.Module, calibration: torch.Tensor, checkpoint: Path) -> QuantizedModel:
        """Calibrate, search, correct; the model's provenance then names its sources."""
        from bitdial.api import quantize as run
        from bitdial.cli.data import name_sources

        with self.terminal.progress() as progress:
            quantized = run(network, calibration, self.config, progress=progress, checkpoint=checkpoint)
        name_sources(quantized.program, self.spec, self.weights, self.given)
        return quantized

    def measure(
        self,
        quantized: QuantizedModel,
        network: torch.nn.Module,
        test: ImageSet,
        naive_on: torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """The curve into the program, the baselines into its provenance; returns the baselines. naive_on: calibration images for
        the naive one, None: without it."""
        from bitdial.cli.data import Batches, check_fit
        from bitdial.cli.measure import measure_baselines, measure_curve, naive_program

        check_fit(quantized.program, test)
        batches = Batches(test, 100)
        with self.terminal.progress() as progress:
            quantized.program.curve = measure_curve(quantized, batches, None, progress)
            naive = None if naive_on is None else naive_program(network, naive_on, self.config, progress)
            rows = measure_baselines(network, naive, lambda x: quantized(x, quantized.ratios[0]), batches, progress)
        self.evaluation["baselines"] = rows
        quantized.program.provenance["evaluation"] = self.evaluation
        return rows

    def share(self, quantized: QuantizedModel, index: int) -> float:
        """Share of all multiplies that run low at a ratio."""
        from bitdial.report.collect import low_share_of_all

        return low_share_of_all(quantized.program, index)

    def print_result(
        self, quantized: QuantizedModel, baselines: list[dict[str, Any]], output: Path, summary: Any,
        kept: tuple[float, float] | None,
    ) -> None:  # fmt: skip
        """The table, and what was written."""
        from bitdial.cli.measure import print_curve

        if quantized.program.curve:
            title = f"{self.spec} on {self.evaluation['images']} test images of {self.evaluation['data']}"
            print_curve(self.terminal, quantized.program.curve, baselines, title=title)
        else:
            rows = [[ratio_name(r), percent(self.share(quantized, i), 1)] for i, r in enumerate(quantized.ratios)]
            self.terminal.table(["ratio", "low-precision multiplies"], rows, "not evaluated")
        floats = len(quantized.program.float_reasons)
        self.terminal.say(
            f"wrote {output}, {size_name(summary.total)} ({size_name(summary.int8_weights)} of weights at 8 bits)"
        )
        if kept is not None:
            self.terminal.say(f"  it holds the ratios from {ratio_name(kept[0])} to {ratio_name(kept[1])} only")
        if floats:
            self.terminal.say(f"  {floats} operators run in float; bitdial inspect lists them with the reasons")

    def write_report(self, output: Path, report: Path, saturated_on: ImageSet | None) -> list[Path]:
        """The report of the file as written (with a band it holds fewer ratios than were measured)."""
        from bitdial.artifact import load_program
        from bitdial.cli.data import Batches, draw
        from bitdial.cli.measure import report_rows
        from bitdial.cli.report import SATURATION_IMAGES, build_report, count_saturated, write_report

        program = load_program(output)
        saturation: list[dict[str, Any]] = []
        if saturated_on is not None:
            with self.terminal.progress() as progress:
                few = Batches(draw(saturated_on, SATURATION_IMAGES, self.config.seed), 100)
                saturation = count_saturated(program, few, progress)
        rows = report_rows(program.provenance.get("evaluation"))
        return write_report(build_report(program, output.stem, baselines=rows, saturation=saturation), report)
