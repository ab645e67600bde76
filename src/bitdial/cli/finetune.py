"""`bitdial finetune`: train a quantized network on, so that one model is good at every ratio."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, machine, options
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, duration, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.quantization.program import Program

_LIBRARIES = ("zoo:", "torchvision:", "timm:")  # their networks have random weights unless --weights is given


@command
def finetune(
    *,
    output: options.ModelOutput,
    start: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL.bitdial",
            help="What bitdial quantize wrote: its settings and groups are kept. Left out: the network is quantized first.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        option("--model", "SPEC", "The float network, as for bitdial quantize. Naming a module or file runs its code."),
    ] = None,
    weights: Annotated[
        Path | None,
        option(
            "--weights", "FILE",
            "Its trained weights, those that were quantized: .safetensors, .pt or .pth (no pickled objects).",
        ),
    ] = None,
    num_classes: options.NumClasses = None,
    data: options.Data,
    train_images: Annotated[
        int | None,
        option(
            "--train-images", "N", "Train on so many images, drawn by the seed of the quantization. Default: all.",
            options.DATA_PANEL, min=1,
        ),
    ] = None,
    validation_images: Annotated[
        int | None,
        option(
            "--validation-images", "N",
            "Images of the train part held out to judge states; used neither for training nor for calibration. 0: none, the last "
            "state is the result. Default: 5 % of the train part, at most 2000.", options.DATA_PANEL, min=0,
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        option(
            "--augment/--no-augment", "",
            "Random horizontal flips and shifts by up to 4 pixels. Default: for colour pictures, not for grey ones or ready "
            "arrays, which are often letters or digits. Switch it off where left and right differ in meaning.",
            options.DATA_PANEL,
        ),
    ] = None,
    training: Annotated[Given, options_of("bitdial.finetuning.config:FinetuneConfig")],
    threads: options.Threads = None,
    resume: Annotated[
        bool,
        option(
            "--resume/--no-resume", "",
            "Go on with an interrupted training of the same settings; OUT.bitdial.finetune.ckpt keeps it.", "Device",
        ),
    ] = True,
    quantizing: Annotated[
        Given,
        options_of(
            "bitdial.quantization.config:QuantizeConfig",
            without=("seed", "batch_size"),
            panel="Quantizing first (without MODEL.bitdial)",
        ),
    ],
    evaluate: Annotated[
        bool | None,
        option(
            "--evaluate/--no-evaluate", "",
            "Measure the curve before and after on the test part, and keep both. Default: if there is one.",
            options.EVALUATION_PANEL,
        ),
    ] = None,
    eval_images: Annotated[
        int,
        option(
            "--eval-images", "N", "Test images at most, drawn by the seed of the quantization.", options.EVALUATION_PANEL, min=1
        ),
    ] = 2000,
    report: Annotated[
        Path | None,
        option(
            "--report", "FILE.html", "Also write a page: curve before and after, training, settings.", options.OUTPUT_PANEL
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        option("--plot", "FILE.png|.svg", "Also write its pictures as one (needs matplotlib).", options.OUTPUT_PANEL),
    ] = None,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Train a quantized network on, so that one model is good at every ratio of its dial.

    Give what bitdial quantize wrote together with the network, weights and data it was made from; or leave the file out, and the
    network is quantized first. Ctrl-C keeps the state after the present update (a second one stops at once): the same command
    goes on there and ends with the same weights. If the loss diverges, the best state so far is written, and said so.
    """
    started = time.perf_counter()
    _check_sources(start, model, weights, data, output)
    assert model is not None
    files.check_output(output, force)
    _check_reports(report, plot)
    from bitdial.finetuning.config import FinetuneConfig

    settings = FinetuneConfig(**training)
    if start is not None and quantizing:
        name = quantizing.flags[0]
        raise ConfigError(f"{name} is decided by {start.name} already; leave it out, or leave {start.name} out")
    machine.set_threads(threads)
    from bitdial.artifact import load_program
    from bitdial.cli.data import DataOptions
    from bitdial.cli.finetune_work import Work, check_classes, split_train, warnings_of
    from bitdial.pipeline.finetuning import checked_device
    from bitdial.pipeline.start import start_config
    from bitdial.quantization.config import QuantizeConfig
    from bitdial.zoo.registry import build_model

    checked_device(settings)
    program = load_program(start) if start is not None else None
    if program is not None and start is not None:
        config = start_config(program, start.name)
    else:
        config = QuantizeConfig(**quantizing, seed=settings.seed)
    stored = (program.provenance.get("source") or {}) if program is not None else {}
    given = DataOptions(**data)
    network = build_model(model, weights, num_classes)
    train = given.load("train", stored)
    if program is not None:
        wanted = _calibration_images(program)
    else:
        wanted = quantizing.get("calibration_images", min(config.calibration_images, len(train)))
    parts = split_train(train, wanted, config.seed, validation_images, train_images, augment)
    test, record = given.test_images(evaluate, eval_images, config.seed, terminal, stored)
    if program is not None:
        for part in (train, test):
            if part is not None:
                check_classes(program, part)
    work = Work(terminal, model, weights, config, settings, given, output, program, start.name if start else "", stored)
    if not resume:
        work.forget()
    prepared, before = work.begin(network, parts)
    if program is None:
        for part in (train, test):
            if part is not None:
                check_classes(before, part)
    said = "augmented by flips and shifts" if parts.augmented else "as they are"
    terminal.note(
        f"training on {len(parts.training)} images, {said}; {len(parts.validation)} held out for validation; "
        f"{settings.torch_device}, {'bfloat16' if settings.bfloat16 else 'float32'}"
    )
    done = work.train(prepared, before, parts)
    after = done.program
    work.describe(after, done, parts)
    summary = _save(after, output)  # now, so that stopping the evaluation loses nothing
    work.forget()
    terminal.interrupted = lambda: f"stopped; {output} is written, without its curve"
    if test is not None:
        work.compare(network, before, after, test, record)
        summary = _save(after, output)
    terminal.interrupted = lambda: f"stopped; {output} is written"
    work.print_result(after, done, parts)
    terminal.say(f"wrote {output}, {size_name(summary.total)}")
    written = _write_reports(after, output, report, plot)
    for path in written:
        terminal.say(f"wrote {path}")
    seconds = time.perf_counter() - started
    terminal.say(f"took {duration(seconds)}, {duration(done.record.seconds)} of it training")
    provenance = after.provenance["finetuning"]
    terminal.emit(
        {
            "command": "finetune",
            "output": str(output),
            "sizes": {k: v for k, v in vars(summary).items() if k != "path"},
            "curve": after.curve,
            "before": provenance.get("before", []),
            "differences": provenance.get("differences", []),
            "evaluation": after.provenance.get("evaluation") if test is not None else None,
            "training": {k: v for k, v in provenance.items() if k not in ("before", "differences")},
            "warnings": [*after.provenance.get("warnings", ()), *warnings_of(after, len(parts.validation))],
            "report": [str(path) for path in written],
            "seconds": seconds,
        }
    )


def _check_sources(start: Path | None, model: str | None, weights: Path | None, data: Given, output: Path) -> None:
    """Raise ConfigError unless there is a network with its original weights, and data."""
    if start is not None:
        if model is None or (weights is None and model.startswith(_LIBRARIES)):
            raise ConfigError(
                f"{start.name} holds 8-bit weights only; finetuning needs the original ones: give --model and --weights"
            )
        if start.exists() and output.exists() and start.samefile(output):
            raise ConfigError(f"-o {output} is the file to start from; give another name")
    elif model is None:
        raise ConfigError("finetune needs --model and --weights, and MODEL.bitdial if it is quantized already")
    elif weights is None and model.startswith(_LIBRARIES):
        raise ConfigError(f"{model} without --weights has random weights; give the trained ones with --weights")
    if "data" not in data:
        raise ConfigError("finetune needs --data: the labelled pictures to train on")


def _check_reports(report: Path | None, plot: Path | None) -> None:
    """Raise OutputError or ConfigError now if they could not be written; former ones are replaced."""
    if report is not None:
        from bitdial.cli.report import check_report

        check_report(report)
    if plot is not None:
        from bitdial.report.drawing import check_plot_path

        files.check_output(plot, force=True, option="--plot")
        check_plot_path(plot)


def _calibration_images(start: Program) -> int:
    """How many calibration images the start was made with. Raises DataError."""
    from bitdial.errors import DataError

    samples = (start.provenance.get("calibration") or {}).get("samples")
    if not isinstance(samples, int) or samples < 1:
        raise DataError("the model does not tell how many calibration images it was made with; leave it out")
    return samples


def _save(program: Program, output: Path) -> Any:
    from bitdial.artifact import save_program

    return save_program(program, output)


def _write_reports(program: Program, output: Path, report: Path | None, plot: Path | None) -> list[Path]:
    """The page and the picture, of the model as written."""
    if report is None and plot is None:
        return []
    from bitdial.report.finetuning import finetuning_report
    from bitdial.report.finetuning_page import finetuning_chart, render_finetuning_html

    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = finetuning_report(program, output.stem, created)
    return files.write_made((report, lambda: render_finetuning_html(content)), (plot, lambda: finetuning_chart(content)))
