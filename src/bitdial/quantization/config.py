"""Everything a user can set about quantization, with its defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bitdial.errors import ConfigError
from bitdial.quantization.latency_table import LatencyTableSetting
from bitdial.settings import BaseConfig


class QuantizeConfig(BaseConfig):
    """Settings of `bitdial.quantize`. Unknown names and values out of range raise ConfigError.

    ratios              shares of the low-eligible multiply-accumulates that run low; 0 is always among them
    selector            "evolutionary" | "greedy" | "random"
    group_size          feature channels that share a shift (16, 32; 64 for the NPU)
    low_bits            width of low activations and weights, 2 to 7; "auto": per layer the widest that is about as fast as 4
                        bits on the target of `latency_table` (by up to `auto_tolerance`)
    low_bits_weights    width of low weights, if different
    latency_table       times of layers measured on a target: a path or a `LatencyTable`; for low_bits = "auto" and
                        latency_gain, and to predict the time of every ratio
    auto_tolerance      for low_bits = "auto": most time, as a multiple of the 4-bit time
    latency_gain        0: groups are chosen by accuracy alone. Above: at every ratio r they also have at least latency_gain
                        * r of the predicted gain of ratio 1 in time (0.8: 40 % of it at 50 %), where that is possible
    extraction          "static" shifts from calibration, "dynamic" per sample at run time, "naive": always the top bits
    shift_choice        "least_squares": least error of the layer's outputs; "value_error": of the activations themselves
                        (weights by output error); "plain": from the largest magnitude of each group
    weight_granularity  weight shifts per "output" channel and group, per "block" of 16 outputs, or per "group"
    calibration         range of a tensor: "mse", "percentile" or "minmax"
    percentile          for calibration = "percentile", in percent
    equalize            None, or 0..1: move range differences between channels into the weights first (1: all of them)
    smooth              None, or 0..1: SmoothQuant's alpha; move range differences behind LayerNorms into the linear layers
                        that read them (1: all of them). Not together with equalize, which decides the same factors
    rounding_slack      how far an 8-bit weight may move, in low steps, so that its low value rounds to the better side
    bias_correction     restore the mean of every layer's outputs at every ratio
    sort_channels       sort channels by range so that groups are alike (layout; no cost at run time)
    nested              groups low at one ratio stay low at higher ones (False: chosen for every ratio alone)
    calibration_images  at most so many samples are used
    keep_answers        share of the 8-bit model's answers that a useful ratio keeps on the calibration samples; quantizing warns
                        of ratios that keep less, and serving stops below them unless told otherwise. 0: all are useful
    search_images       samples that the search scores candidates on
    population, generations, survivors  of the evolutionary search
    keep_8bit, ignored  glob patterns of module paths or node names: never low; left in float
    lower_first_last, lower_depthwise   let these layers run low too (they stay at 8 bits otherwise)
    seed                of selection
    batch_size          samples per step while calibrating and searching
    """

    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    selector: Literal["evolutionary", "greedy", "random"] = "evolutionary"
    group_size: int = Field(16, ge=1, le=4096)
    low_bits: Annotated[int, Field(ge=2, le=7)] | Literal["auto"] = 4
    low_bits_weights: int | None = Field(None, ge=2, le=7)
    latency_table: LatencyTableSetting | None = None
    auto_tolerance: float = Field(1.15, ge=1.0, le=10.0)
    latency_gain: float = Field(0.0, ge=0.0, le=1.0)
    extraction: Literal["static", "dynamic", "naive"] = "static"
    shift_choice: Literal["least_squares", "value_error", "plain"] = "least_squares"
    weight_granularity: Literal["output", "block", "group"] = "group"
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    equalize: float | None = Field(None, ge=0.0, le=1.0)
    smooth: float | None = Field(None, ge=0.0, le=1.0)
    rounding_slack: float = Field(0.2, ge=0.0, le=1.0)
    bias_correction: bool = True
    sort_channels: bool = True
    nested: bool = True
    calibration_images: int = Field(256, ge=1)
    keep_answers: float = Field(0.97, ge=0.0, le=1.0)
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
        super().__init__(**values)
        self._check_latency()
        if self.smooth is not None and self.equalize is not None:
            raise ConfigError("smooth and equalize both decide the factors behind LayerNorms: set one of them")

    def _check_latency(self) -> None:
        wanted = "low_bits = 'auto'" if self.low_bits == "auto" else f"latency_gain = {self.latency_gain:g}"
        if self.latency_table is None and (self.low_bits == "auto" or self.latency_gain > 0.0):
            raise ConfigError(f"{wanted} needs latency_table, the times measured on the target: pass a file or a table")
        if self.low_bits == "auto" and self.low_bits_weights is not None:
            raise ConfigError("low_bits = 'auto' chooses the width of weights too: leave out low_bits_weights")
        if self.latency_gain > 0.0 and self.selector == "random":
            raise ConfigError("selector = 'random' cannot meet a latency_gain: use 'evolutionary' or 'greedy'")

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
    def activation_bits(self) -> int:
        """Width of low activations; 4 where it is chosen per layer (for layers that the choice leaves out)."""
        return 4 if self.low_bits == "auto" else self.low_bits

    @property
    def weight_bits(self) -> int:
        """Width of low weights; 4 where it is chosen per layer."""
        return self.activation_bits if self.low_bits_weights is None else self.low_bits_weights
