"""Everything a user can set about quantization, with its defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bitdial.errors import ConfigError
from bitdial.quantization.latency_table import LatencyTableSetting
from bitdial.quantization.targets import FOUR_BITS, GROUP_SIZE, GROUP_SIZES, Target
from bitdial.settings import BaseConfig, setting

_PRECISION, _SEARCH = "Precision", "Search"


class QuantizeConfig(BaseConfig):
    """Settings of `bitdial.quantize`. Unknown names and values out of range raise ConfigError.

    low_bits = "auto" takes, per layer, the widest low values that are about as fast as 4 bits: by the times of `latency_table`
    where there is one, else by what is known of `target` (`bitdial.quantization.targets`), which "paper", "npu" and "cuda" make
    4 bits everywhere. A number goes before either. `latency_table` is a path or a `LatencyTable`; latency_gain needs it: with
    0.8 the groups of 50 % also have at least 40 % of the predicted gain of ratio 1 in time, where that is possible. Of
    shift_choice, "value_error" chooses weight shifts by output error all the same; stored low weights bring their own.
    `smooth` and `equalize` decide the same factors: set one of them.
    """

    ratios: tuple[float, ...] = setting(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "Settings of the dial: shares of the eligible multiplies that run low. Above 1 they are percent; 0 is always among them.",
        "LIST", _PRECISION, read="ratios",
    )  # fmt: skip
    selector: Literal["evolutionary", "greedy", "random"] = setting(
        "evolutionary", "evolutionary, greedy or random.", "NAME", _SEARCH
    )
    target: Target = setting(
        "cpu",
        "What the model will run on, for widths (--low-bits auto) and group size: cpu (this machine), another one's instruction "
        "set, or 4 bits everywhere: paper, npu, cuda.",
        panel=_PRECISION,
    )
    low_bits: Annotated[int, Field(ge=2, le=7)] | Literal["auto"] = setting(
        "auto",
        "Width of low values; auto: per layer the widest that is about as fast as 4 bits on the target, or by --latency-table.",
        "2..7|auto", _PRECISION, read="low bits",
    )  # fmt: skip
    low_bits_weights: int | None = setting(None, "Width of low weights, if different.", "2..7", _PRECISION, ge=2, le=7)
    group_size: int = setting(
        GROUP_SIZE, "Feature channels that share a shift. For --target npu 64, for cuda 32, unless given.",
        "N", _PRECISION, ge=1, le=4096,
    )  # fmt: skip
    weight_granularity: Literal["output", "block", "group"] = setting(
        "group", "What shares a weight shift, within a group: one output channel, a block of 16, or all.", panel=_PRECISION
    )
    shift_choice: Literal["least_squares", "value_error", "plain"] = setting(
        "least_squares",
        "Shifts of least output error, of least error of the activations, or from the largest magnitudes.",
        panel=_PRECISION,
    )
    low_weights: Literal["stored", "derived"] = setting(
        "stored",
        "Low weights: integers of their own, solved for the errors that they meet (4 bits a weight more to store), or derived "
        "from the 8-bit ones.",
        panel=_PRECISION,
    )
    effort: Literal["normal", "high"] = setting(
        "normal",
        "High: tune the stored low weights and the bias table on the calibration samples, towards the float network's outputs.",
        panel=_PRECISION,
    )
    smooth: float | None = setting(
        0.5,
        "For transformers: move range differences behind LayerNorms into the weights first (SmoothQuant's alpha; 1: all "
        "of them; 0, or equalize: none).",
        "0..1", _PRECISION, ge=0.0, le=1.0,
    )  # fmt: skip
    equalize: float | None = Field(
        None, ge=0.0, le=1.0, description="Move range differences between channels into the weights first; 1: all of them."
    )
    extraction: Literal["static", "dynamic", "naive"] = setting(
        "static",
        "Activation shifts from calibration, from each sample at run time, or always the top bits.",
        panel=_PRECISION,
    )
    calibration: Literal["mse", "percentile", "minmax"] = setting(
        "mse", "How ranges are chosen.", "", _PRECISION, option="--calibration-method"
    )
    percentile: float = Field(99.99, gt=50.0, le=100.0, description="For calibration = 'percentile', in percent.")
    bias_correction: bool = Field(True, description="Restore the mean of every layer's outputs at every ratio.")
    sort_channels: bool = Field(
        True, description="Sort channels by range so that groups are alike (layout; no cost at run time)."
    )
    lift: bool = Field(
        True,
        description="Lift the outputs of GELU, SiLU and the like above zero where only layers read them, which take it back in "
        "their biases: unsigned, they have twice the steps.",
    )
    weight_pairs: bool = Field(
        False,
        description="Scale 8-bit weights so that the sum of two adjacent ones of one sign is at most 128: with AVX2 alone, ratio "
        "0 is faster then, its weights a little coarser.",
    )
    keep_8bit: tuple[str, ...] = setting(
        (), "Layers that never run low, e.g. 'head*' (repeatable).", "PATTERN", _PRECISION
    )
    ignored: tuple[str, ...] = setting((), "Layers left in float (repeatable).", "PATTERN", _PRECISION)
    lower_first_last: bool = Field(False, description="Let the first and the last layer run low too.")
    lower_depthwise: bool = Field(False, description="Let depthwise convolutions run low too.")
    latency_table: LatencyTableSetting | None = setting(
        None,
        "Times of layers measured on a target, for --low-bits auto, --latency-gain and predicted times.",
        "FILE", _PRECISION, read="path",
    )  # fmt: skip
    auto_tolerance: float = setting(
        1.15,
        "With --low-bits auto: most time of a layer, as a multiple of its 4-bit time.",
        "1..10", _PRECISION, ge=1.0, le=10.0,
    )  # fmt: skip
    calibration_images: int = setting(
        256, "Calibration images, drawn by --seed from the train part (all if fewer).", "N", "Data", option="--images", ge=1
    )
    lengths: tuple[int, ...] = Field(
        (),
        description="Shorter sequences that the model is compiled for too, e.g. (16, 32): axis 1 of every input, whose full "
        "length is that of the calibration data. A batch goes to the shortest that holds it, padded with zeros.",
    )
    keep_answers: float = setting(
        0.97,
        "Share of the 8-bit model's answers on the calibration images that a ratio of use keeps. Others are warned of, and "
        "serve stops below them. 0: all are of use.",
        "SHARE", "Evaluation", read="share", ge=0.0, le=1.0,
    )  # fmt: skip
    search: Literal["predicted", "exact"] = setting(
        "predicted",
        "Judge candidates by predicted errors, or by running them on the calibration images.",
        panel=_SEARCH,
    )
    search_images: int = setting(
        256, "Calibration images that candidates are scored on; predictions take 64 at most.", "N", _SEARCH, ge=1
    )
    population: int = setting(50, "Candidates per generation.", "N", _SEARCH, ge=2)
    generations: int = setting(50, "Generations per ratio.", "N", _SEARCH, ge=0)
    survivors: int = Field(15, ge=1, description="Candidates of a generation that the next one descends from.")
    latency_gain: float = setting(
        0.0,
        "Let every ratio r have at least this times r of the predicted gain of 100 % in time (needs --latency-table); 0: "
        "accuracy alone decides.",
        "0..1", _SEARCH, ge=0.0, le=1.0,
    )  # fmt: skip
    nested: bool = Field(
        True, description="Groups low at one ratio stay low at higher ones (False: each ratio is chosen alone)."
    )
    batch_size: int = setting(64, "Images per step.", "N", ge=1)
    seed: int = setting(0, "Seed of every random choice.", "N", ge=0)

    def __init__(self, **values: Any) -> None:
        if "group_size" not in values and (size := GROUP_SIZES.get(str(values.get("target")))):
            values["group_size"] = size
        if values.get("equalize") is not None:  # it does so itself
            values.setdefault("smooth", None)
        super().__init__(**values)
        self._check_latency()
        if self.effort == "high" and not self.stores_plane:
            raise ConfigError(
                "effort = 'high' tunes low weights that are stored: leave low_weights and extraction at 'stored' and 'static'"
            )
        if self.smooth and self.equalize is not None:
            raise ConfigError("smooth and equalize both decide the factors behind LayerNorms: set one of them")

    def _check_latency(self) -> None:
        if self.latency_table is None and self.latency_gain > 0.0:
            raise ConfigError(
                f"latency_gain = {self.latency_gain:g} needs latency_table, the times measured on the target: pass a file or a "
                "table"
            )
        if self.low_bits == "auto" and self.low_bits_weights is not None and not self.four_bits:
            raise ConfigError(
                "low_bits = 'auto', the default, chooses the width of weights too: give low_bits a number beside "
                "low_bits_weights"
            )
        if self.latency_gain > 0.0 and self.selector == "random":
            raise ConfigError("selector = 'random' cannot meet a latency_gain: use 'evolutionary' or 'greedy'")

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 <= r <= 1.0 for r in ratios):
            raise ValueError("ratios must lie in 0..1")
        return tuple(sorted({0.0, *ratios}))

    @field_validator("lengths")
    @classmethod
    def _lengths(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in lengths):
            raise ValueError("lengths must be positive")
        return tuple(sorted(set(lengths)))

    @field_validator("keep_8bit", "ignored", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def stores_plane(self) -> bool:
        """Whether low weights are solved for and stored; naive extraction is the baseline that does not."""
        return self.low_weights == "stored" and self.extraction != "naive"

    @property
    def four_bits(self) -> bool:
        """Whether the target makes "auto" 4 bits everywhere."""
        return self.target in FOUR_BITS

    @property
    def activation_bits(self) -> int:
        """Width of low activations; 4 where it is chosen per layer (for layers that the choice leaves out)."""
        return 4 if self.low_bits == "auto" else self.low_bits

    @property
    def weight_bits(self) -> int:
        """Width of low weights; 4 where it is chosen per layer."""
        return self.activation_bits if self.low_bits_weights is None else self.low_bits_weights
