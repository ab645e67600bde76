"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitdial.cli.configs import OUTPUT_PANEL as OUTPUT_PANEL
from bitdial.cli.configs import Given, options_of

DATA_PANEL, EVALUATION_PANEL, ENGINE_PANEL = "Data", "Evaluation", "Engine"
DIAL_PANEL, BATCHING_PANEL = "The dial", "Batching and limits"


def option(names: str, metavar: str, told: str, panel: str = "", **more: Any) -> Any:
    """An option of one command, for Annotated. names: with its short form after a blank. metavar: "" for a flag."""
    return typer.Option(*names.split(), metavar=metavar or None, help=told, rich_help_panel=panel or None, **more)


Model = Annotated[Path, typer.Argument(metavar="MODEL.bitdial", help="The quantized model.", show_default=False)]
NetworkSpec = Annotated[
    str,
    option(
        "--model", "SPEC",
        "zoo:NAME, torchvision:NAME, timm:NAME, package.module:callable, path/to/file.py:callable (naming a module or "
        "Python file runs its code) or path/to/file.onnx (a float model, with its weights).",
    ),
]
Weights = Annotated[
    Path | None, option("--weights", "FILE", "Trained weights: .safetensors, .pt or .pth (no pickled objects).")
]
NumClasses = Annotated[int | None, option("--num-classes", "N", "Outputs of the last layer.", min=1)]
Data = Annotated[Given, options_of("bitdial.cli.data:DataOptions")]
Images = Annotated[
    int | None, option("--images", "N", "Use so many images, drawn by --seed. Default: all.", DATA_PANEL, min=1)
]
EvalImages = Annotated[
    int, option("--eval-images", "N", "Test images at most, drawn by --seed.", EVALUATION_PANEL, min=1)
]
BatchSize = Annotated[int, option("--batch-size", "N", "Images per step.", min=1)]
Seed = Annotated[int, option("--seed", "N", "Seed of every random choice.", min=0)]
Threads = Annotated[int | None, option("--threads", "N", "CPU threads. Default: torch's own choice.", min=1)]
EngineName = Annotated[str, option("--engine", "NAME", "What runs the model; see bitdial doctor.")]
Isa = Annotated[
    str | None,
    option(
        "--isa", "NAME",
        "Instruction set of the cpu engine; see bitdial doctor. Default: BITDIAL_CPU_ISA, else the best that the "
        "processor has.", ENGINE_PANEL,
    ),
]
Memory = Annotated[
    str | None,
    option("--memory", "fast|small", "Of the cpu engine; small: one copy of the weights. Default: fast.", ENGINE_PANEL),
]
Npu = Annotated[Given, options_of("bitdial.engines.npu.options:NpuOptions")]
ModelOutput = Annotated[Path, option("--output -o", "OUT.bitdial", "The file to write.")]
Report = Annotated[Path | None, option("--report", "FILE.html", "Also write the report.", OUTPUT_PANEL)]
Force = Annotated[bool, option("--force -f", "", "Replace files that exist already.", OUTPUT_PANEL)]


def npu_options(given: Given, engine: str | None) -> dict[str, Any]:
    """Options of `create_engine` from those of `Npu`. Raises ConfigError, also for another engine."""
    if not given:
        return {}
    from bitdial.engines.npu.options import NpuOptions

    return NpuOptions.of(**given).engine_options(engine)
