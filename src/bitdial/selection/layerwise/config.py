"""Everything a user can set about layer-wise compilation, with its defaults. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from bitdial.errors import ConfigError
from bitdial.quantization.latency_table import LatencyTableSetting
from bitdial.settings import BaseConfig

PRECISIONS = ("low", "int8", "bfloat16", "float32")  # ascending
Precision = Literal["low", "int8", "bfloat16", "float32"]
Metric = Literal["weight", "activation", "sqnr", "mse", "propagated"]
METRICS: tuple[Metric, ...] = ("weight", "activation", "sqnr", "mse")  # local ones, of the paper
ALL_METRICS: tuple[Metric, ...] = (*METRICS, "propagated")
COMBINED = "combined"
RELATIVE_TIME: dict[Precision, float] = {"low": 0.75, "int8": 1.0, "bfloat16": 4.0, "float32": 4.0}


class LayerwiseConfig(BaseConfig):
    """Settings of `bitdial.compile`. Unknown names and values out of range raise ConfigError.

    Where the paper (QuantuneV2, arXiv 2501.07161) is silent, the setting says what was assumed.

    precisions          what a layer may be: "low" (all its groups low), "int8", "bfloat16", "float32"
    metric              what ranks the layers: "propagated", the noise that reaches the network's output; local metrics, any of
                        "weight", "activation", "sqnr", "mse", or "combined" for all four; several are averaged, each
                        scaled to sum 1 over the layers (assumed)
    sqnr_change         how "change in SQNR" is read: "local", "output", "power" or "decibel"; see
                        `bitdial.selection.layerwise.scores` (the default is assumed)
    order               "density": layers are raised by what they gain per byte or second; "score": the most sensitive first,
                        all the way up, as a plain ranking does (assumed)
    budget_size         largest file, in bytes; or as a share of the all-int8 file's ("80%")
    budget_latency      longest time per sample, in seconds; or as a share of the all-int8 plan's ("80%"), which is all that
                        latency = "macs" can take
    latency             where times come from: "macs" (multiply-accumulates times `relative_time`), "table" (`latency_table`),
                        "measured" (a table measured here with the CPU engine)
    latency_table       a path or a `LatencyTable`, for latency = "table"
    relative_time       time of a multiply-accumulate at each precision, int8 being 1. Used by "macs", and for float layers by all
                        (no engine here compiles them). Believed, not measured
    accuracy_floor      least top-1 accuracy on the validation data, 0..1
    low_bits, low_bits_weights, group_size, weight_granularity, calibration, percentile, rounding_slack, sort_channels
                        as in QuantizeConfig
    bias                "samples": means are restored from the float run's samples, with no further run; "runs": layer by layer on
                        the calibration data once the plan is made, two runs more; "none"
    fusion              "best": the legal fusion with the fewest conversions, given the plan; "default"; "none": unfused;
                        "isolated": unfused, and every layer between a quantize and a dequantize of its own
    dial                keep ratio 0 (low layers at 8 bits) beside ratio 1, the plan. Without it low weights are stored packed
    lower_first_last    first and last layer may be low; here the scores decide
    lower_depthwise     depthwise convolutions may be low
    ignored             glob patterns of layers left in float32 and out of the plan
    calibration_images, batch_size, seed
    patches             samples of a layer's input, rows per layer
    metric_values       samples of a value, numbers per value, compared between the two runs
    """

    precisions: tuple[Precision, ...] = ("low", "int8")
    metric: tuple[Metric, ...] = ("propagated",)
    sqnr_change: Literal["local", "output", "power", "decibel"] = "local"
    order: Literal["density", "score"] = "density"
    budget_size: float | str | None = None
    budget_latency: float | str | None = None
    latency: Literal["macs", "table", "measured"] = "macs"
    latency_table: LatencyTableSetting | None = None
    relative_time: dict[Precision, float] = Field(default_factory=RELATIVE_TIME.copy)
    accuracy_floor: float | None = Field(None, ge=0.0, le=1.0)
    low_bits: int = Field(4, ge=2, le=7)
    low_bits_weights: int | None = Field(None, ge=2, le=7)
    group_size: int = Field(16, ge=1, le=4096)
    weight_granularity: Literal["output", "block", "group"] = "group"
    calibration: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    rounding_slack: float = Field(0.2, ge=0.0, le=1.0)
    sort_channels: bool = True
    bias: Literal["samples", "runs", "none"] = "samples"
    fusion: Literal["best", "default", "none", "isolated"] = "best"
    dial: bool = False
    lower_first_last: bool = True
    lower_depthwise: bool = False
    ignored: tuple[str, ...] = ()
    calibration_images: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    patches: int = Field(1024, ge=16)
    metric_values: int = Field(65536, ge=16)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget_size is None and self.budget_latency is None and self.accuracy_floor is None:
            raise ConfigError(
                "a layer-wise plan needs a budget: give budget_size, budget_latency or accuracy_floor (without one every layer "
                f"would be {self.precisions[-1]})"
            )
        if self.latency == "table" and self.latency_table is None:
            raise ConfigError("latency = 'table' needs latency_table: a file of bitdial latency-table, or a LatencyTable")
        for name in ("budget_size", "budget_latency"):
            parse_budget(getattr(self, name), name)
        if self.latency == "macs" and self.budget_latency is not None and not is_share(self.budget_latency):
            raise ConfigError(
                "budget_latency in seconds needs times: set latency to 'table' or 'measured', or give a share of the all-int8 "
                "plan's, for example '80%'"
            )

    @field_validator("precisions", mode="before")
    @classmethod
    def _precisions(cls, value: Any) -> Any:
        given = {value} if isinstance(value, str) else set(value)
        unknown = sorted(str(v) for v in given - set(PRECISIONS))
        if unknown or not given:
            raise ValueError(f"precisions are one or more of {', '.join(PRECISIONS)}")
        return tuple(p for p in PRECISIONS if p in given)

    @field_validator("metric", mode="before")
    @classmethod
    def _metric(cls, value: Any) -> Any:
        given = value.replace(",", "+").split("+") if isinstance(value, str) else list(value)
        names = {name.strip() for name in given}
        if names == {COMBINED}:
            return METRICS
        if not names or not names <= set(ALL_METRICS):
            raise ValueError(f"metrics are one or more of {', '.join(ALL_METRICS)} joined by +, or {COMBINED}")
        return tuple(name for name in ALL_METRICS if name in names)

    @field_validator("relative_time")
    @classmethod
    def _times(cls, value: dict[Precision, float]) -> dict[Precision, float]:
        merged = {**RELATIVE_TIME, **value}
        if not all(0.0 < v < 1e6 for v in merged.values()):
            raise ValueError("times must be positive")
        return merged

    @field_validator("ignored", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def is_share(budget: float | str) -> bool:
    """Whether a budget is written as a share ("80%")."""
    return isinstance(budget, str) and budget.strip().endswith("%")


def parse_budget(budget: float | str | None, name: str) -> float | None:
    """The number of a budget: bytes or seconds, or a share ("80%" is 0.8). Raises ConfigError unless positive and finite."""
    if budget is None:
        return None
    text = str(budget).strip()
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        raise ConfigError(f"{name} {budget!r} is neither a number nor a share such as '80%'") from None
    if not 0.0 < value < 1e18:
        raise ConfigError(f"{name} is {budget}: give a number above 0")
    return value
