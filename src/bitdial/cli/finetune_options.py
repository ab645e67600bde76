"""The options of `bitdial finetune`: every setting of `FinetuneConfig` under its own name, and those of quantizing first.

An option that was left out is None: the config has the defaults, and `--help` states them (a test compares the two).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitdial.cli import options

_TRAINING, _LOSS, _NETWORK, _DEVICE = "Training", "Passes and loss", "Scales, bias, norms", "Device"
_QUANTIZING = "Quantizing first (without MODEL.bitdial)"


def _option(name: str, metavar: str, told: str, panel: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, help=told, rich_help_panel=panel, show_default=False
    )
    return option


Start = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL.bitdial",
        help="What bitdial quantize wrote: its settings and groups are kept. Left out: the network is quantized first.",
        show_default=False,
    ),
]
Spec = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="The float network, as for bitdial quantize. Naming a module or file runs its code.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Its trained weights, those that were quantized: .safetensors, .pt or .pth (no pickled objects).",
        show_default=False,
    ),
]

Epochs = Annotated[int | None, _option("--epochs", "N", "Passes over the training data. Default: 3.", _TRAINING)]
BatchSize = Annotated[
    int | None, _option("--batch-size", "N", "Images per step on the device. Default: 128.", _TRAINING)
]
Accumulation = Annotated[int | None, _option("--accumulation", "N", "Steps per update. Default: 1.", _TRAINING)]
Optimizer = Annotated[str | None, _option("--optimizer", "adamw|sgd", "sgd: momentum 0.9. Default: adamw.", _TRAINING)]
LearningRate = Annotated[
    float | None,
    _option("--learning-rate", "RATE", "At its peak; warm-up before, half a cosine after. Default: 0.0005.", _TRAINING),
]
Warmup = Annotated[
    float | None, _option("--warmup", "0..1", "Share of all updates that warm up. Default: 0.05.", _TRAINING)
]
WeightDecay = Annotated[
    float | None, _option("--weight-decay", "RATE", "Of weights, not of biases and norms. Default: 0.0001.", _TRAINING)
]
GradientClip = Annotated[
    float | None,
    _option("--gradient-clip", "NORM", "Largest norm of an update's gradient; 0: any. Default: 1.", _TRAINING),
]
Rederivations = Annotated[
    int | None,
    _option(
        "--rederivations", "N", "How often shifts and bias table are derived anew meanwhile. Default: 4.", _TRAINING
    ),
]
Reselect = Annotated[
    bool | None,
    typer.Option(
        "--reselect/--no-reselect",
        help="Choose the low groups of the ratios between anew at the end. Default: no.",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
]
Evaluations = Annotated[
    int | None, _option("--evaluations", "N", "On the validation images, per epoch. Default: 1.", _TRAINING)
]
Keep = Annotated[
    str | None,
    _option(
        "--keep",
        "best|last",
        "Which state is the result: the best on the held-out images (the latest of equals), or the last. Default: best.",
        _TRAINING,
    ),
]
Patience = Annotated[
    int | None,
    _option("--patience", "N", "Stop after so many evaluations without a better one; 0: never. Default: 0.", _TRAINING),
]
Divergence = Annotated[
    float | None,
    _option(
        "--divergence",
        "FACTOR",
        "Stop when the mean loss of 20 updates exceeds the first so many times. Default: 5.",
        _TRAINING,
    ),
]
TrainingSeed = Annotated[
    int | None,
    _option(
        "--seed",
        "N",
        "Seed of order, augmentation and drawn ratios (and of quantizing, where that comes first). Default: 0.",
        _TRAINING,
    ),
]

Passes = Annotated[
    str | None,
    _option(
        "--passes",
        "dual|low|sampled",
        "A high and a low pass per step, the low one alone, or one at a drawn ratio. Default: dual.",
        _LOSS,
    ),
]
LowRatio = Annotated[
    str | None,
    _option(
        "--low-ratio",
        "mixed|highest|uniform",
        "Ratio of the low pass: the highest in every second step and any other between, always the highest, or any. "
        "Default: mixed.",
        _LOSS,
    ),
]
LowWeight = Annotated[float | None, _option("--low-weight", "X", "Weight of the low pass. Default: 1.", _LOSS)]
CrossEntropy = Annotated[
    float | None, _option("--cross-entropy", "X", "Weight of the loss against the labels. Default: 1.", _LOSS)
]
Distillation = Annotated[
    float | None, _option("--distillation", "X", "Weight of the distance to the teacher. Default: 0.25.", _LOSS)
]
Temperature = Annotated[float | None, _option("--temperature", "T", "Of the soft labels. Default: 4.", _LOSS)]
Teacher = Annotated[
    str | None, _option("--teacher", "float|8bit", "The network before or after quantization. Default: float.", _LOSS)
]

Scales = Annotated[
    str | None, _option("--scales", "fixed|learned", "Learned: LSQ, as parameters. Default: fixed.", _NETWORK)
]
Bias = Annotated[
    str | None,
    _option(
        "--bias",
        "derived|learned",
        "Bias table that restores the 8-bit model's means, or rows that are trained. Default: derived.",
        _NETWORK,
    ),
]
BatchNorm = Annotated[
    str | None,
    _option(
        "--batch-norm",
        "folded|reestimated",
        "Reestimated: statistics of the outputs of convolutions go on being followed. Default: folded.",
        _NETWORK,
    ),
]

Device = Annotated[
    str | None, _option("--device", "NAME", "A device of torch; auto: cuda where there is one. Default: auto.", _DEVICE)
]
Precision = Annotated[
    str | None,
    _option(
        "--precision",
        "float32|bfloat16|auto",
        "Of convolutions; auto: bfloat16 where the processor multiplies in it. Default: auto.",
        _DEVICE,
    ),
]
CheckpointSeconds = Annotated[
    float | None, _option("--checkpoint-seconds", "S", "Time between checkpoints. Default: 120.", _DEVICE)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Go on with an interrupted training of the same settings; OUT.bitdial.finetune.ckpt keeps it.",
        rich_help_panel=_DEVICE,
    ),
]

TrainImages = Annotated[
    int | None,
    typer.Option(
        "--train-images",
        metavar="N",
        min=1,
        help="Train on so many images, drawn by the seed of the quantization. Default: all.",
        rich_help_panel=options.DATA_PANEL,
        show_default=False,
    ),
]
ValidationImages = Annotated[
    int | None,
    typer.Option(
        "--validation-images",
        metavar="N",
        min=0,
        help="Images of the train part held out to judge states; used neither for training nor for calibration. "
        "0: none, the last state is the result. Default: 5 % of the train part, at most 2000.",
        rich_help_panel=options.DATA_PANEL,
        show_default=False,
    ),
]
AugmentImages = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        help="Random horizontal flips and shifts by up to 4 pixels. Default: for colour pictures, not for grey ones or ready "
        "arrays, which are often letters or digits. Switch it off where left and right differ in meaning.",
        rich_help_panel=options.DATA_PANEL,
        show_default=False,
    ),
]
EvalImages = Annotated[
    int,
    typer.Option(
        "--eval-images",
        metavar="N",
        min=1,
        help="Test images at most, drawn by the seed of the quantization.",
        rich_help_panel=options.EVALUATION_PANEL,
    ),
]
Evaluate = Annotated[
    bool | None,
    typer.Option(
        "--evaluate/--no-evaluate",
        help="Measure the curve before and after on the test part, and keep both. Default: if there is one.",
        rich_help_panel=options.EVALUATION_PANEL,
        show_default=False,
    ),
]

Images = Annotated[
    int | None,
    _option("--images", "N", f"Calibration images. Default: {options.DEFAULT_IMAGES} (all if fewer).", _QUANTIZING),
]
Ratios = Annotated[str | None, _option("--ratios", "LIST", "As for bitdial quantize.", _QUANTIZING)]
LowBits = Annotated[int | None, _option("--low-bits", "2..7", "Width of low values.", _QUANTIZING)]
GroupSize = Annotated[int | None, _option("--group-size", "N", "Feature channels that share a shift.", _QUANTIZING)]
Extraction = Annotated[str | None, _option("--extraction", "static|dynamic|naive", "Activation shifts.", _QUANTIZING)]
Keep8Bit = Annotated[
    list[str] | None, _option("--keep-8bit", "PATTERN", "Layers that never run low (repeatable).", _QUANTIZING)
]
Ignored = Annotated[
    list[str] | None, _option("--ignored", "PATTERN", "Layers left in float (repeatable).", _QUANTIZING)
]
Smooth = Annotated[float | None, _option("--smooth", "0..1", "SmoothQuant's alpha, for transformers.", _QUANTIZING)]
Selector = Annotated[str | None, _option("--selector", "NAME", "evolutionary, greedy or random.", _QUANTIZING)]
SearchImages = Annotated[
    int | None, _option("--search-images", "N", "Images that candidates are scored on.", _QUANTIZING)
]
Population = Annotated[int | None, _option("--population", "N", "Candidates per generation.", _QUANTIZING)]
Generations = Annotated[int | None, _option("--generations", "N", "Generations per ratio.", _QUANTIZING)]

Report = Annotated[
    Path | None,
    _option(
        "--report", "FILE.html", "Also write a page: curve before and after, training, settings.", options.OUTPUT_PANEL
    ),
]
Plot = Annotated[
    Path | None,
    _option("--plot", "FILE.png|.svg", "Also write its pictures as one (needs matplotlib).", options.OUTPUT_PANEL),
]
