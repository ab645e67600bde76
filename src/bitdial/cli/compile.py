"""`bitdial compile`: one precision per layer, chosen from two runs of the network, under budgets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bitdial.cli import files, machine, options
from bitdial.cli.configs import Given, command, options_of
from bitdial.cli.options import option
from bitdial.cli.quantize import Task
from bitdial.cli.terminal import Terminal, duration, percent, size_name
from bitdial.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from bitdial.api import QuantizedModel
    from bitdial.selection.layerwise import LayerwiseConfig

_PLAN, _BUDGETS, _EVALUATION = "Plan", "Budgets", options.EVALUATION_PANEL


@command
def compile(
    *,
    model: options.NetworkSpec,
    output: options.ModelOutput,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    data: options.Data,
    plan: Annotated[str, option("--plan", "layerwise", "Kind of plan.", _PLAN)] = "layerwise",
    settings: Annotated[Given, options_of("bitdial.selection.layerwise.config:LayerwiseConfig")],
    latency: Annotated[
        str | None,
        option(
            "--latency", "macs|table|measured",
            "Where times come from: multiply-accumulates, --latency-table, or the CPU engine here. Default: table if one is "
            "given, measured for a budget in time, else macs.", _BUDGETS,
        ),
    ] = None,
    validation_images: Annotated[
        int, option("--validation-images", "N", "For --accuracy-floor, drawn by --seed.", _BUDGETS, min=1)
    ] = 1000,
    evaluate: Annotated[
        bool | None,
        option(
            "--evaluate/--no-evaluate", "",
            "Measure accuracy on the test part, beside float32, and keep it. Default: if there is one.", _EVALUATION,
        ),
    ] = None,
    eval_images: options.EvalImages = 1000,
    report: options.Report = None,
    threads: options.Threads = None,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Give every layer one precision under budgets (QuantuneV2); the file runs like any other.

    Layers are ranked by local metrics of two runs over the calibration images, one before and one after quantization: no
    retraining, no search. A budget that cannot be met is refused with the nearest value that can.
    """
    started = time.perf_counter()
    if plan != "layerwise":
        raise ConfigError(f"--plan {plan} is unknown: layerwise is the one there is (bitdial quantize makes dials)")
    if "data" not in data:
        raise ConfigError("compile needs --data: pictures like those the network will see")
    files.check_output(output, force)
    if report is not None:
        from bitdial.cli.report import check_report

        check_report(report)
    from bitdial.selection.layerwise import LayerwiseConfig

    in_time = isinstance(settings.get("budget_latency"), float)
    source = latency or ("table" if "latency_table" in settings else "measured" if in_time else "macs")
    config = LayerwiseConfig(**settings, latency=source)
    machine.set_threads(threads)
    from bitdial.cli.data import DataOptions
    from bitdial.quantization.config import QuantizeConfig

    given = DataOptions(**data)
    task = Task(terminal, QuantizeConfig(seed=config.seed, batch_size=config.batch_size), given, model, weights)
    network, calibration, test = task.load(num_classes, settings.get("calibration_images"), evaluate, eval_images)
    compiled = _compile(task, network, calibration, config, validation_images)
    baselines = task.measure(compiled, network, test) if test is not None else []
    summary = compiled.save(output)
    terminal.interrupted = lambda: f"stopped; {output} is written"
    _print_result(terminal, task, compiled, baselines, output, summary)
    written = task.write_report(output, report, None) if report is not None else []
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
    from bitdial.cli.data import Batches, name_sources

    validation = None
    if config.accuracy_floor is not None:
        train = task.given.load("train").shuffled(task.config.seed + 1)
        validation = Batches(train.head(min(validation_images, len(train))), 100)
    with task.terminal.progress() as progress:
        compiled = run(network, calibration, config, validation=validation, progress=progress)
    name_sources(compiled.program, task.spec, task.weights, task.given)
    return compiled


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
