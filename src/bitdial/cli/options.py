"""Options that several commands share, and the readers of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from bitdial.errors import ConfigError

DATA_PANEL, EVALUATION_PANEL, ENGINE_PANEL, OUTPUT_PANEL = "Data", "Evaluation", "Engine", "Output"
DIAL_PANEL, BATCHING_PANEL = "The dial", "Batching and limits"
DEFAULT_IMAGES = 256  # for calibration

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
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="A folder of pictures (with train/ and test/, or train.zip and test.zip), a .zip or .npz file, 'digits', "
        "or torchvision:NAME.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        help="Mean of the pixels (0..1) per channel; one number for grey. Default: what the model was quantized with, "
        "else ImageNet's.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="R,G,B",
        help="Standard deviation of the pixels; defaults as for --mean.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        "--resize",
        metavar="SIZE",
        help="Picture size the network takes: 224 or 224x320 (height x width). Default: as the pictures are.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
Crop = Annotated[
    float | None,
    typer.Option(
        "--crop",
        metavar="SHARE",
        help="With --resize: scale the picture so that the size is this share of its shorter side, and cut the centre "
        "out (0.875 is usual for ImageNet). Default: stretch.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
SplitSeed = Annotated[
    int | None,
    typer.Option(
        "--split-seed",
        metavar="N",
        min=0,
        help="Seed of the split into train and test where the data have none of their own. Default: the one the model "
        "was quantized with, else 0.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        help="Where torchvision: data sets lie. Default: ./data.",
        rich_help_panel=DATA_PANEL,
        show_default=False,
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Let torchvision fetch the data set if it is not there.", rich_help_panel=DATA_PANEL
    ),
]
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
CalibrationImages = Annotated[
    int | None,
    typer.Option(
        "--images",
        metavar="N",
        min=1,
        help=f"Calibration images, drawn by --seed from the train part. Default: {DEFAULT_IMAGES} (all if fewer).",
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


def parse_share(text: str, option: str) -> float:
    """A share in 0..1 from text: "25%" is 25 percent; without the sign numbers above 1 are percent ("25"), others
    shares ("0.25", and "1" is all). Raises ConfigError.
    """
    stripped = text.strip()
    signed = stripped.endswith("%")
    try:
        value = float(stripped.rstrip("%").strip())
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is no number; write 25, 25% or 0.25") from None
    share = value / 100 if signed or value > 1 else value
    if not math.isfinite(value) or not 0.0 <= share <= 1.0:
        raise ConfigError(f"{option}: {stripped} is outside 0..1 (or 0..100 percent)")
    return share


def parse_ratios(text: str, option: str = "--ratios") -> tuple[float, ...]:
    """Ascending, distinct ratios from "0,25,50" or "0,0.25,0.5"; each entry by the rule of `parse_share`."""
    return tuple(sorted({parse_share(part, option) for part in text.split(",")}))


def parse_band(text: str) -> tuple[float, float]:
    """The two ends of "LOW..HIGH". Raises ConfigError."""
    low, separator, high = text.partition("..")
    if not separator:
        raise ConfigError(f"--band: '{text}' is not of the form LOW..HIGH, for example 50..100")
    ends = parse_share(low, "--band"), parse_share(high, "--band")
    if ends[0] > ends[1]:
        raise ConfigError(f"--band: {text} has its larger end first; write {high}..{low}")
    return ends


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated finite numbers. Raises ConfigError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: '{text}' is no list of numbers; write for example 0.485,0.456,0.406") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{option}: '{text}' holds a number that is not finite")
    return numbers


def parse_size(text: str, option: str = "--resize") -> tuple[int, int]:
    """(height, width) of "224" or "224x320". Raises ConfigError."""
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(f"{option}: '{text}' is no size; write 224 or 224x320 (height x width)")
    sizes = [int(part) for part in parts]
    if min(sizes) < 1 or max(sizes) > 1 << 14:
        raise ConfigError(f"{option}: {text} must lie between 1 and {1 << 14}")
    return sizes[0], sizes[-1]
