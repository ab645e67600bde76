"""Everything a user can set about quantization, with its defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flexiq.errors import ConfigError


class QuantizeConfig(BaseModel):
    """Settings of `flexiq.quantize`. Unknown names and values out of range raise ConfigError.

    ratios              shares of the low-eligible multiply-accumulates that run low; 0 is always among them
    selector            "evolutionary" | "greedy" | "random"
    group_size          feature channels that share a shift (16, 32; 64 for the NPU)
    low_bits            width of low activations and weights, 2 to 7
    low_bits_weights    width of low weights, if different
    extraction          "static" shifts from calibration, "dynamic" per sample at run time, "naive": always the top bits
    shift_choice        "least_squares": least error of the layer's outputs; "value_error": of the activations themselves
                        (weights by output error); "plain": from the largest magnitude of each group
    weight_granularity  weight shifts per "output" channel and group, per "block" of 16 outputs, or per "group"
    calibration         range of a tensor: "mse", "percentile" or "minmax"
    percentile          for calibration = "percentile", in percent
    equalize            None, or 0..1: move range differences between channels into the weights first (1: all of them)
    rounding_slack      how far an 8-bit weight may move, in low steps, so that its low value rounds to the better side
    bias_correction     restore the mean of every layer's outputs at every ratio
    sort_channels       sort channels by range so that groups are alike (layout; no cost at run time)
    nested              groups low at one ratio stay low at higher ones (False: chosen for every ratio alone)
    calibration_images  at most so many samples are used
    search_images       samples that the search scores candidates on
    population, generations, survivors  of the evolutionary search
    keep_8bit, ignored  glob patterns of module paths or node names: never low; left in float
    lower_first_last, lower_depthwise   let these layers run low too (they stay at 8 bits otherwise)
    seed                of selection
    batch_size          samples per step while calibrating and searching
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    selector: Literal["evolutionary", "greedy", "random"] = "evolutionary"
    group_size: int = Field(16, ge=1, le=4096)
    low_bits: int = Field(4, ge=2, le=7)
    low_bits_weights: int | None = Field(None, ge=2, le=7)
    extraction: Literal["static", "dynamic", "naive"] = "static"
    shift_choice: Literal["least_squares", "value_error", "plain"] = "least_squares"
    weight_granularity: Literal["output", "block", "group"] = "group"
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    equalize: float | None = Field(None, ge=0.0, le=1.0)
    rounding_slack: float = Field(0.2, ge=0.0, le=1.0)
    bias_correction: bool = True
    sort_channels: bool = True
    nested: bool = True
    calibration_images: int = Field(256, ge=1)
    search_images: int = Field(256, ge=1)
    population: int = Field(50, ge=2)
    generations: int = Field(50, ge=0)
    survivors: int = Field(15, ge=1)
    keep_8bit: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lower_first_last: bool = False
    lower_depthwise: bool = False
    seed: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "config"
            raise ConfigError(f"QuantizeConfig.{where}: {first['msg']} (got {first.get('input')!r})") from None

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= r <= 1.0 for r in ratios):
            raise ValueError("ratios must lie in 0..1")
        return tuple(sorted({0.0, *ratios}))

    @field_validator("keep_8bit", "ignored", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def weight_bits(self) -> int:
        return self.low_bits if self.low_bits_weights is None else self.low_bits_weights

    def updated(self, **changes: Any) -> QuantizeConfig:
        """A copy with some settings changed (validated)."""
        return QuantizeConfig(**{**self.model_dump(), **changes})
