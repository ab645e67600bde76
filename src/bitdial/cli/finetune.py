"""`bitdial finetune`: train a quantized network on, so that one model is good at every ratio."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.cli import files, machine, options
from bitdial.cli import finetune_options as own
from bitdial.cli.terminal import Terminal, duration, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from bitdial.quantization.program import Program

_LIBRARIES = ("zoo:", "torchvision:", "timm:")  # their networks have random weights unless --weights is given


def finetune(
    output: options.ModelOutput,
    start: own.Start = None,
    model: own.Spec = None,
    weights: own.Weights = None,
    num_classes: options.NumClasses = None,
    data: options.Data = None,
    train_images: own.TrainImages = None,
    validation_images: own.ValidationImages = None,
    augment: own.AugmentImages = None,
    mean: options.Mean = None,
    std: options.Std = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    split_seed: options.SplitSeed = None,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    epochs: own.Epochs = None,
    batch_size: own.BatchSize = None,
    accumulation: own.Accumulation = None,
    optimizer: own.Optimizer = None,
    learning_rate: own.LearningRate = None,
    warmup: own.Warmup = None,
    weight_decay: own.WeightDecay = None,
    gradient_clip: own.GradientClip = None,
    rederivations: own.Rederivations = None,
    reselect: own.Reselect = None,
    evaluations: own.Evaluations = None,
    keep: own.Keep = None,
    patience: own.Patience = None,
    divergence: own.Divergence = None,
    seed: own.TrainingSeed = None,
    passes: own.Passes = None,
    low_ratio: own.LowRatio = None,
    low_weight: own.LowWeight = None,
    cross_entropy: own.CrossEntropy = None,
    distillation: own.Distillation = None,
    temperature: own.Temperature = None,
    teacher: own.Teacher = None,
    scales: own.Scales = None,
    bias: own.Bias = None,
    batch_norm: own.BatchNorm = None,
    device: own.Device = None,
    precision: own.Precision = None,
    checkpoint_seconds: own.CheckpointSeconds = None,
    threads: options.Threads = None,
    resume: own.Resume = True,
    images: own.Images = None,
    ratios: own.Ratios = None,
    low_bits: own.LowBits = None,
    group_size: own.GroupSize = None,
    extraction: own.Extraction = None,
    keep_8bit: own.Keep8Bit = None,
    ignored: own.Ignored = None,
    smooth: own.Smooth = None,
    selector: own.Selector = None,
    search_images: own.SearchImages = None,
    population: own.Population = None,
    generations: own.Generations = None,
    evaluate: own.Evaluate = None,
    eval_images: own.EvalImages = 2000,
    report: own.Report = None,
    plot: own.Plot = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a quantized network on, so that one model is good at every ratio of its dial.

    Give what bitdial quantize wrote together with the network, weights and data it was made from; or leave the file out, and the
    network is quantized first. Ctrl-C keeps the state after the present update (a second one stops at once): the same command
    goes on there and ends with the same weights. If the loss diverges, the best state so far is written, and said so.
    """
    terminal = Terminal(json, quiet)
    started = time.perf_counter()
    with terminal.running():
        _check_sources(start, model, weights, data, output)
        assert model is not None and data is not None
        files.check_output(output, force)
        _check_reports(report, plot)
        from bitdial.finetuning.config import FinetuneConfig

        settings = FinetuneConfig(
            **_given(
                epochs=epochs, batch_size=batch_size, accumulation=accumulation, optimizer=optimizer,
                learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay, gradient_clip=gradient_clip,
                rederivations=rederivations, reselect=reselect, evaluations=evaluations, keep=keep, patience=patience,
                divergence=divergence, seed=seed, passes=passes, low_ratio=low_ratio, low_weight=low_weight,
                cross_entropy=cross_entropy, distillation=distillation, temperature=temperature, teacher=teacher,
                scales=scales, bias=bias, batch_norm=batch_norm, device=device, precision=precision,
                checkpoint_seconds=checkpoint_seconds,
            )
        )  # fmt: skip
        quantizing = _given(
            ratios=None if ratios is None else options.parse_ratios(ratios), low_bits=low_bits, group_size=group_size,
            extraction=extraction, keep_8bit=tuple(keep_8bit) if keep_8bit else None,
            ignored=tuple(ignored) if ignored else None, smooth=smooth, selector=selector,
            search_images=search_images, population=population, generations=generations,
        )  # fmt: skip
        if start is not None:
            brought = [*quantizing, *(["images"] if images is not None else [])]
            if brought:
                name = brought[0].replace("_", "-")
                raise ConfigError(
                    f"--{name} is decided by {start.name} already; leave it out, or leave {start.name} out"
                )
        machine.set_threads(threads)
        from bitdial.artifact import load_program
        from bitdial.cli.data import DataOptions
        from bitdial.cli.finetune_work import Work, check_classes, load_test, split_train, warnings_of
        from bitdial.pipeline.finetuning import checked_device
        from bitdial.pipeline.start import start_config
        from bitdial.quantization.config import QuantizeConfig
        from bitdial.zoo.registry import build_model

        checked_device(settings)
        program = load_program(start) if start is not None else None
        if program is not None and start is not None:
            config = start_config(program, start.name)
        else:
            config = QuantizeConfig(
                **quantizing, seed=settings.seed, calibration_images=images or options.DEFAULT_IMAGES
            )
        stored = (program.provenance.get("source") or {}) if program is not None else {}
        given = DataOptions(data, mean, std, resize, crop, split_seed, data_root, download)
        network = build_model(model, weights, num_classes)
        train = given.load("train", stored)
        wanted = (
            _calibration_images(program) if program is not None else images or min(options.DEFAULT_IMAGES, len(train))
        )
        parts = split_train(train, wanted, config.seed, validation_images, train_images, augment)
        test, of = load_test(given, stored, evaluate, eval_images, config.seed, terminal)
        if program is not None:
            for part in (train, test):
                if part is not None:
                    check_classes(program, part)
        work = Work(
            terminal, model, weights, config, settings, given, output, program, start.name if start else "", stored
        )
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
            work.compare(network, before, after, test, of)
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


def _given(**values: Any) -> dict[str, Any]:
    """The options that were given; the configs know the defaults of the others."""
    return {name: value for name, value in values.items() if value is not None}


def _check_sources(start: Path | None, model: str | None, weights: Path | None, data: str | None, output: Path) -> None:
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
    if data is None:
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
    from bitdial.report.drawing import plot_for
    from bitdial.report.finetuning import finetuning_report
    from bitdial.report.finetuning_page import finetuning_chart, render_finetuning_html
    from bitdial.report.writing import write_files

    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = finetuning_report(program, output.stem, created)
    contents: dict[Path, bytes] = {}
    if report is not None:
        contents[report] = render_finetuning_html(content).encode()
    if plot is not None:
        contents[plot] = plot_for(finetuning_chart(content), plot)
    return write_files(contents)
