"""Everything a user can set about finetuning, with its defaults."""

from __future__ import annotations

from typing import Any, Literal

from bitdial.errors import ConfigError
from bitdial.settings import BaseConfig, setting

_TRAINING, _LOSS, _NETWORK, _DEVICE = "Training", "Passes and loss", "Scales, bias, norms", "Device"


class FinetuneConfig(BaseConfig):
    """Settings of `bitdial.finetune`. Unknown names and values out of range raise ConfigError.

    passes = "dual" adds the losses of a high (8-bit) and a low pass over the same batch. distillation weighs the Kullback-Leibler
    divergence of soft labels. scales "fixed": activation scales from calibration, weight scales from the largest weights. In
    bfloat16 8-bit integers are exact, accumulators are rounded. keep = "best" goes by the mean accuracy over the ratios on the
    validation data, and takes the latest of those that are equally good, to a standard error; validation data that the float
    network knows by heart favour states near the start. After a divergence it is the best in any case.
    """

    epochs: int = setting(3, "Passes over the training data.", "N", _TRAINING, ge=1)
    batch_size: int = setting(128, "Images per step on the device.", "N", _TRAINING, ge=1)
    accumulation: int = setting(1, "Steps per update.", "N", _TRAINING, ge=1)
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "sgd: momentum 0.9.", panel=_TRAINING)
    learning_rate: float = setting(5e-4, "At its peak; warm-up before, half a cosine after.", "RATE", _TRAINING, gt=0.0)
    warmup: float = setting(0.05, "Share of all updates that warm up.", "0..1", _TRAINING, ge=0.0, le=1.0)
    weight_decay: float = setting(1e-4, "Of weights, not of biases, norms and scales.", "RATE", _TRAINING, ge=0.0)
    passes: Literal["dual", "low", "sampled"] = setting(
        "dual", "A high and a low pass per step, the low one alone, or one at a drawn ratio.", panel=_LOSS
    )
    low_ratio: Literal["mixed", "highest", "uniform"] = setting(
        "mixed",
        "Ratio of the low pass: the highest in every second step and any other between, always the highest, or any.",
        panel=_LOSS,
    )
    low_weight: float = setting(1.0, "Weight of the low pass.", "X", _LOSS, gt=0.0)
    cross_entropy: float = setting(1.0, "Weight of the loss against the labels.", "X", _LOSS, ge=0.0)
    distillation: float = setting(0.25, "Weight of the distance to the teacher; 0: no teacher.", "X", _LOSS, ge=0.0)
    temperature: float = setting(4.0, "Of the soft labels.", "T", _LOSS, gt=0.0)
    teacher: Literal["float", "8bit"] = setting(
        "float", "The network before or after quantization (at ratio 0).", panel=_LOSS
    )
    scales: Literal["fixed", "learned"] = setting("fixed", "Learned: LSQ, as parameters.", panel=_NETWORK)
    bias: Literal["derived", "learned"] = setting(
        "derived", "Bias table that restores the 8-bit model's means, or rows that are trained.", panel=_NETWORK
    )
    batch_norm: Literal["folded", "reestimated"] = setting(
        "folded", "Reestimated: statistics of the outputs of convolutions go on being followed.", panel=_NETWORK
    )
    rederivations: int = setting(
        4, "How often shifts and bias table are derived anew meanwhile, at equal distances.", "N", _TRAINING, ge=0
    )
    reselect: bool = setting(
        False, "Choose the low groups of the ratios between anew at the end.", "", _TRAINING, option="--reselect/--no-reselect"
    )
    gradient_clip: float = setting(1.0, "Largest norm of an update's gradient; 0: any.", "NORM", _TRAINING, ge=0.0)
    precision: Literal["float32", "bfloat16", "auto"] = setting(
        "auto", "Of convolutions; auto: bfloat16 where the processor multiplies in it.", panel=_DEVICE
    )
    device: str = setting("auto", "A device of torch; auto: cuda where there is one.", "NAME", _DEVICE)
    keep: Literal["best", "last"] = setting(
        "best",
        "Which state is the result: the best on the held-out images (the latest of equals), or the last.",
        panel=_TRAINING,
    )
    patience: int = setting(0, "Stop after so many evaluations without a better one; 0: never.", "N", _TRAINING, ge=0)
    evaluations: int = setting(1, "On the validation images, per epoch.", "N", _TRAINING, ge=1)
    divergence: float = setting(
        5.0,
        "Stop when the mean loss of 20 updates exceeds the first so many times, or is not finite.",
        "FACTOR",
        _TRAINING,
        gt=1.0,
    )
    checkpoint_seconds: float = setting(120.0, "Time between checkpoints.", "S", _DEVICE, ge=0.0)
    seed: int = setting(
        0, "Seed of order, augmentation and drawn ratios (and of quantizing, where that comes first).", "N", _TRAINING, ge=0
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.cross_entropy == 0.0 and self.distillation == 0.0:
            raise ConfigError("cross_entropy and distillation are both 0: nothing is left to learn from; raise one")

    @property
    def torch_device(self) -> str:
        """The device's name, "auto" resolved."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def bfloat16(self) -> bool:
        """Whether convolutions run in bfloat16, "auto" resolved for the device."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        import torch

        if self.torch_device.startswith("cuda"):
            return bool(torch.cuda.is_bf16_supported())
        return self.torch_device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
