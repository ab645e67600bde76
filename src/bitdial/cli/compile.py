"""`bitdial compile`: one precision per layer, chosen from two runs of the network, under budgets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitdial.cli import files, machine, options
from bitdial.cli.quantize import Task
from bitdial.cli.terminal import Terminal, duration, percent, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from bitdial.api import QuantizedModel
    from bitdial.selection.layerwise import LayerwiseConfig
    from bitdial.zoo.datasets import ImageSet

_PLAN, _BUDGETS, _EVALUATION = "Plan", "Budgets", options.EVALUATION_PANEL
_UNITS = {"b": 1.0, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "kib": 1024.0, "mib": 1024.0**2}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def parse_amount(text: str | None, units: dict[str, float], option: str, example: str) -> float | str | None:
    """"300k" or "5ms" -> the number in the base unit; "80%" stays a share. Raises ConfigError."""
    if text is None:
        return None
    given = text.strip()
    if given.endswith("%"):
        return given
    number = given.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = given[len(number) :].strip().lower()
    try:
        return float(number) * (units[unit] if unit else 1.0)
    except (ValueError, KeyError):
        raise ConfigError(f"{option}: '{text}' is no amount; write for example {example}") from None


def compile(
    model: options.NetworkSpec,
    output: options.ModelOutput,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    data: options.Data = None,
    images: options.CalibrationImages = None,
    mean: options.Mean = None,
    std: options.Std = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    split_seed: options.SplitSeed = None,
    data_root: options.DataRoot = None,
    download: options.Download = False,
    plan: Annotated[
        str, typer.Option("--plan", metavar="layerwise", help="Kind of plan.", rich_help_panel=_PLAN)
    ] = "layerwise",
    precisions: Annotated[
        str,
        typer.Option(
            "--precisions",
            metavar="LIST",
            help="What a layer may be: low, int8, bfloat16, float32. Float layers run in torch, and are no faster.",
            rich_help_panel=_PLAN,
        ),
    ] = "low,int8",
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="NAMES",
            help="What ranks the layers: propagated (noise carried to the network's output), or local metrics: weight, "
            "activation, sqnr, mse, several joined by +, or combined for these four.",
            rich_help_panel=_PLAN,
        ),
    ] = "propagated",
    sqnr_change: Annotated[
        str,
        typer.Option(
            "--sqnr-change",
            metavar="local|output|power|decibel",
            help="How the change in SQNR is taken; see docs/layerwise.md.",
            rich_help_panel=_PLAN,
        ),
    ] = "local",
    order: Annotated[
        str,
        typer.Option(
            "--order",
            metavar="density|score",
            help="Raise layers by gain per byte or second, or the most sensitive first.",
            rich_help_panel=_PLAN,
        ),
    ] = "density",
    fusion: Annotated[
        str,
        typer.Option(
            "--fusion",
            metavar="best|default|none|isolated",
            help="best: the fusion with the fewest conversions for the plan; the last two are for comparison.",
            rich_help_panel=_PLAN,
        ),
    ] = "best",
    low_bits: Annotated[
        int, typer.Option("--low-bits", metavar="2..7", help="Width of low values.", rich_help_panel=_PLAN)
    ] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", metavar="N", help="Feature channels that share a shift.", rich_help_panel=_PLAN)
    ] = 16,
    ignored: Annotated[
        list[str] | None,
        typer.Option(
            "--ignored",
            metavar="PATTERN",
            help="Layers left in float32 and out of the plan (repeatable).",
            rich_help_panel=_PLAN,
            show_default=False,
        ),
    ] = None,
    keep_dial: Annotated[
        bool,
        typer.Option(
            "--keep-dial",
            help="Keep ratio 0 (low layers at 8 bits) beside 100 %, the plan; low weights then take 8 bits in the file.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    budget_size: Annotated[
        str | None,
        typer.Option(
            "--budget-size",
            metavar="BYTES|SHARE",
            help="Largest file: 300k, 1.5MB, 200KiB, or a share of the all-int8 file's: 80%.",
            rich_help_panel=_BUDGETS,
            show_default=False,
        ),
    ] = None,
    budget_latency: Annotated[
        str | None,
        typer.Option(
            "--budget-latency",
            metavar="TIME|SHARE",
            help="Longest time per sample: 5ms, 800us, or a share of the all-int8 plan's: 80%.",
            rich_help_panel=_BUDGETS,
            show_default=False,
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency",
            metavar="macs|table|measured",
            help="Where times come from: multiply-accumulates, --latency-table, or the CPU engine here. Default: table if one "
            "is given, measured for a budget in time, else macs.",
            rich_help_panel=_BUDGETS,
            show_default=False,
        ),
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            "--latency-table",
            metavar="FILE",
            help="Times of layers measured on a target (bitdial latency-table).",
            rich_help_panel=_BUDGETS,
            show_default=False,
        ),
    ] = None,
    accuracy_floor: Annotated[
        str | None,
        typer.Option(
            "--accuracy-floor",
            metavar="SHARE",
            help="Least top-1 accuracy on images of the train part that calibration does not use, e.g. 91%.",
            rich_help_panel=_BUDGETS,
            show_default=False,
        ),
    ] = None,
    validation_images: Annotated[
        int,
        typer.Option(
            "--validation-images",
            metavar="N",
            min=1,
            help="For --accuracy-floor, drawn by --seed.",
            rich_help_panel=_BUDGETS,
        ),
    ] = 1000,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Measure accuracy on the test part, beside float32, and keep it. Default: if there is one.",
            rich_help_panel=_EVALUATION,
            show_default=False,
        ),
    ] = None,
    eval_images: options.EvalImages = 1000,
    report: options.Report = None,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Give every layer one precision under budgets (QuantuneV2); the file runs like any other.

    Layers are ranked by local metrics of two runs over the calibration images, one before and one after quantization: no
    retraining, no search. A budget that cannot be met is refused with the nearest value that can.
    """
    terminal = Terminal(json, quiet)
    started = time.perf_counter()
    with terminal.running():
        if plan != "layerwise":
            raise ConfigError(f"--plan {plan} is unknown: layerwise is the one there is (bitdial quantize makes dials)")
        if data is None:
            raise ConfigError("compile needs --data: pictures like those the network will see")
        files.check_output(output, force)
        if report is not None:
            from bitdial.cli.report import check_report

            check_report(report)
        from bitdial.selection.layerwise import LayerwiseConfig

        time_budget = parse_amount(budget_latency, _TIMES, "--budget-latency", "5ms or 80%")
        source = latency or ("table" if latency_table is not None else "measured" if isinstance(time_budget, float) else "macs")
        settings: dict[str, Any] = {
            "precisions": tuple(p.strip() for p in precisions.split(",")), "metric": metric, "sqnr_change": sqnr_change,
            "order": order, "fusion": fusion, "low_bits": low_bits, "group_size": group_size,
            "ignored": tuple(ignored or ()), "dial": keep_dial, "latency": source, "latency_table": latency_table,
            "budget_size": parse_amount(budget_size, _UNITS, "--budget-size", "300k, 1.5MB or 80%"),
            "budget_latency": time_budget,
            "accuracy_floor": None if accuracy_floor is None else options.parse_share(accuracy_floor, "--accuracy-floor"),
            "calibration_images": images or options.DEFAULT_IMAGES, "batch_size": batch_size, "seed": seed,
        }  # fmt: skip
        config = LayerwiseConfig(**settings)
        machine.set_threads(threads)
        from bitdial.cli.data import DataOptions
        from bitdial.quantization.config import QuantizeConfig

        given = DataOptions(data, mean, std, resize, crop, split_seed, data_root, download)
        task = Task(terminal, QuantizeConfig(seed=seed, batch_size=batch_size), given, model, weights)
        network, calibration, test = task.load(num_classes, images, evaluate, eval_images)
        compiled = _compile(task, network, calibration, config, validation_images)
        baselines = _measure(task, compiled, network, test) if test is not None else []
        summary = compiled.save(output)
        terminal.interrupted = lambda: f"stopped; {output} is written"
        _print_result(terminal, task, compiled, baselines, output, summary)
        written = _write_report(output, report, task) if report is not None else []
        for path in written:
            terminal.say(f"wrote {path}")
        seconds = time.perf_counter() - started
        terminal.say(f"took {duration(seconds)}")
        terminal.emit(
            {
                "command": "compile",
                "output": str(output),
                "sizes": {k: v for k, v in vars(summary).items() if k != "path"},
                "plan": compiled.program.provenance["layerwise"],
                "warnings": compiled.program.provenance.get("warnings", []),
                "curve": compiled.program.curve,
                "baselines": baselines,
                "evaluation": {k: v for k, v in task.evaluation.items() if k != "baselines"},
                "report": [str(path) for path in written],
                "seconds": seconds,
            }
        )


def _compile(
    task: Task, network: torch.nn.Module, calibration: torch.Tensor, config: LayerwiseConfig, validation_images: int
) -> QuantizedModel:
    """The compiled model; its provenance names its sources."""
    from bitdial.api import compile as run
    from bitdial.cli.data import Batches, describe_source

    validation = None
    if config.accuracy_floor is not None:
        train = task.given.load("train").shuffled(task.config.seed + 1)
        validation = Batches(train.head(min(validation_images, len(train))), 100)
    with task.terminal.progress() as progress:
        compiled = run(network, calibration, config, validation=validation, progress=progress)
    compiled.program.provenance["cpu"] = machine.cpu_model()
    compiled.program.provenance["source"] = describe_source(task.spec, task.weights, task.given)
    return compiled


def _measure(
    task: Task, compiled: QuantizedModel, network: torch.nn.Module, test: ImageSet
) -> list[dict[str, Any]]:
    """The curve into the program, float32 into its provenance; returns the baselines."""
    from bitdial.cli.data import Batches, check_fit
    from bitdial.cli.measure import measure_baselines, measure_curve

    check_fit(compiled.program, test)
    batches = Batches(test, 100)
    with task.terminal.progress() as progress:
        compiled.program.curve = measure_curve(compiled, batches, None, progress)
        rows = measure_baselines(network, None, lambda x: compiled(x, compiled.ratios[0]), batches, progress)
    task.evaluation["baselines"] = rows
    compiled.program.provenance["evaluation"] = task.evaluation
    return rows


def _print_result(
    terminal: Terminal,
    task: Task,
    compiled: QuantizedModel,
    baselines: list[dict[str, Any]],
    output: Path,
    summary: Any,
) -> None:
    from bitdial.cli.inspect import print_plan
    from bitdial.cli.measure import print_curve

    plan = compiled.program.provenance["layerwise"]
    print_plan(terminal, plan)
    if compiled.program.curve:
        title = f"{task.spec} on {task.evaluation['images']} test images of {task.evaluation['data']}"
        print_curve(terminal, compiled.program.curve, baselines, compiled.ratios[0], title)
    budgets, reached = plan["budgets"], plan["reached"]
    if budgets["size"] is not None:
        terminal.say(f"size: {size_name(reached['size'])} of a budget of {size_name(int(budgets['size']))}")
    if budgets["latency"] is not None:
        share = reached["latency_share_of_int8"]
        terminal.say(f"latency by {budgets['latency_source']}: {percent(share, 1)} of the all-int8 plan's")
    if reached.get("measured_latency") is not None:
        terminal.say(f"  measured here: {1e3 * reached['measured_latency']:.3f} ms per sample")
    if "accuracy" in reached:
        terminal.say(f"accuracy on validation images: {percent(reached['accuracy'])}")
    terminal.say(f"wrote {output}, {size_name(summary.total)}")


def _write_report(output: Path, report: Path, task: Task) -> list[Path]:
    from bitdial.artifact import load_program
    from bitdial.cli.measure import report_rows
    from bitdial.cli.report import build_report, write_report

    program = load_program(output)
    rows = report_rows(program.provenance.get("evaluation"))
    return write_report(build_report(program, output.stem, baselines=rows, saturation=[]), report)
