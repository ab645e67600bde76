"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitdial.cli.configs import Given, options_of

DATA_PANEL, EVALUATION_PANEL, ENGINE_PANEL, OUTPUT_PANEL = "Data", "Evaluation", "Engine", "Output"
DIAL_PANEL, BATCHING_PANEL = "The dial", "Batching and limits"


def option(names: str, metavar: str, told: str, panel: str = "", **more: Any) -> Any:
    """An option of one command, for Annotated. names: with its short form after a blank. metavar: "" for a flag."""
    return typer.Option(*names.split(), metavar=metavar or None, help=told, rich_help_panel=panel or None, **more)


Model = Annotated[Path, typer.Argument(metavar="MODEL.bitdial", help="The quantized model.", show_default=False)]
NetworkSpec = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="zoo:NAME, torchvision:NAME, timm:NAME, package.module:callable or path/to/file.py:callable. Naming a "
        "module or file runs its code.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Trained weights: .safetensors, .pt or .pth (no pickled objects).",
        show_default=False,
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option("--num-classes", metavar="N", min=1, help="Outputs of the last layer.", show_default=False),
]
Data = Annotated[Given, options_of("bitdial.cli.data:DataOptions")]
Images = Annotated[
    int | None,
    typer.Option(
        "--images",
        metavar="N",
        min=1,
        help="Use so many images, drawn by --seed. Default: all.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
EvalImages = Annotated[
    int,
    typer.Option(
        "--eval-images",
        metavar="N",
        min=1,
        help="Test images at most, drawn by --seed.",
        rich_help_panel=EVALUATION_PANEL,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Images per step.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of every random choice.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="CPU threads. Default: torch's own choice.", show_default=False),
]
EngineName = Annotated[str, typer.Option("--engine", metavar="NAME", help="What runs the model; see bitdial doctor.")]
Isa = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="NAME",
        help="Instruction set of the cpu engine; see bitdial doctor. Default: BITDIAL_CPU_ISA, else the best that the "
        "processor has.",
        rich_help_panel=ENGINE_PANEL,
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="fast|small",
        help="Of the cpu engine; small: one copy of the weights. Default: fast.",
        rich_help_panel=ENGINE_PANEL,
        show_default=False,
    ),
]
MaxRatio = Annotated[
    str | None,
    typer.Option(
        "--max-ratio",
        metavar="SHARE",
        help="Never turn the dial further, e.g. 50% or 0.5. Default: the ceiling that quantizing found, if it found one.",
        rich_help_panel=DIAL_PANEL,
        show_default=False,
    ),
]
TimeoutMs = Annotated[
    float | None,
    typer.Option(
        "--timeout-ms",
        metavar="MS",
        help="Drop requests that cannot be answered so soon. Default: the SLO.",
        rich_help_panel=BATCHING_PANEL,
        show_default=False,
    ),
]
ModelOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT.bitdial", help="The file to write.", show_default=False)
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Also write the report.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace files that exist already.", rich_help_panel=OUTPUT_PANEL)
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to standard output, and nothing else.", rich_help_panel=OUTPUT_PANEL
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bars and no notes.", rich_help_panel=OUTPUT_PANEL)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show where an error arose (traceback).", rich_help_panel=OUTPUT_PANEL)
]
