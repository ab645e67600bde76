"""Everything a user can set about finetuning, with its defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bitdial.errors import ConfigError
from bitdial.settings import BaseConfig


class FinetuneConfig(BaseConfig):
    """Settings of `bitdial.finetune`. Unknown names and values out of range raise ConfigError.

    epochs              passes over the training data
    batch_size          samples per step on the device; `accumulation` steps make one update
    optimizer           "adamw" or "sgd" (momentum 0.9)
    learning_rate       at its peak: linear warm-up over the first `warmup` share of all updates, cosine to 0 after it
    weight_decay        of weights (not of biases, norms and scales)
    passes              "dual": every step runs a high (8-bit) and a low pass over the same batch and adds their losses;
                        "low": the low pass alone; "sampled": one pass at a ratio drawn per step
    low_ratio           of the low pass: "mixed" (the highest ratio in every second step, one drawn from the others in
                        between), "highest", or "uniform" (any ratio above 0)
    low_weight          weight of the low pass's loss beside the high pass's
    cross_entropy       weight of the loss against the labels
    distillation        weight of the distance to the teacher (Kullback-Leibler divergence of soft labels); 0: no teacher
    temperature         of both soft labels
    teacher             "float": the network before quantization; "8bit": the quantized network at ratio 0, both frozen
    scales              "fixed": activation scales from calibration, weight scales from the largest weights; "learned" (LSQ)
    bias                "derived": the bias table restores the 8-bit model's means, derived anew as weights move; "learned":
                        the table's rows are parameters that start there
    batch_norm          "folded", or "reestimated": running statistics of every convolution's outputs go on being followed
    rederivations       how often, at equal distances, shifts and bias table are derived anew while training
    reselect            choose the low groups of the ratios between anew when training is over
    gradient_clip       largest norm of the gradient of an update; 0: any
    precision           "float32", "bfloat16" (8-bit integers are exact in it, accumulators are rounded), or "auto":
                        bfloat16 where the processor multiplies in it
    device              a torch device; "auto": cuda where there is one
    keep                which state is the result: "best" by the mean accuracy over the ratios on the validation data (the
                        latest of those that are equally good, to a standard error), or "last". Validation data that the
                        float network knows by heart favour states near the start. After a divergence it is the best
    patience            stop after so many evaluations without a better score; 0: never
    evaluations         evaluations on the validation data per epoch
    divergence          stop when the loss is not finite or, over 20 updates, exceeds this many times its first value
    checkpoint_seconds  time between checkpoints
    seed                of the order of samples, augmentation and drawn ratios
    """

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(128, ge=1)
    accumulation: int = Field(1, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-4, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0)
    weight_decay: float = Field(1e-4, ge=0.0)
    passes: Literal["dual", "low", "sampled"] = "dual"
    low_ratio: Literal["mixed", "highest", "uniform"] = "mixed"
    low_weight: float = Field(1.0, gt=0.0)
    cross_entropy: float = Field(1.0, ge=0.0)
    distillation: float = Field(0.25, ge=0.0)
    temperature: float = Field(4.0, gt=0.0)
    teacher: Literal["float", "8bit"] = "float"
    scales: Literal["fixed", "learned"] = "fixed"
    bias: Literal["derived", "learned"] = "derived"
    batch_norm: Literal["folded", "reestimated"] = "folded"
    rederivations: int = Field(4, ge=0)
    reselect: bool = False
    gradient_clip: float = Field(1.0, ge=0.0)
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    device: str = "auto"
    keep: Literal["best", "last"] = "best"
    patience: int = Field(0, ge=0)
    evaluations: int = Field(1, ge=1)
    divergence: float = Field(5.0, gt=1.0)
    checkpoint_seconds: float = Field(120.0, ge=0.0)
    seed: int = Field(0, ge=0)

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
