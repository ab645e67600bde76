"""Everything a user can set about layer-wise compilation, with its defaults. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from bitdial.errors import ConfigError
from bitdial.quantization.latency_table import LatencyTableSetting
from bitdial.settings import BaseConfig, setting

PRECISIONS = ("low", "int8", "bfloat16", "float32")  # ascending
Precision = Literal["low", "int8", "bfloat16", "float32"]
Metric = Literal["weight", "activation", "sqnr", "mse", "propagated"]
METRICS: tuple[Metric, ...] = ("weight", "activation", "sqnr", "mse")  # local ones, of the paper
ALL_METRICS: tuple[Metric, ...] = (*METRICS, "propagated")
COMBINED = "combined"
RELATIVE_TIME: dict[Precision, float] = {"low": 0.75, "int8": 1.0, "bfloat16": 4.0, "float32": 4.0}


_PLAN, _BUDGETS = "Plan", "Budgets"


class LayerwiseConfig(BaseConfig):
    """Settings of `bitdial.compile`. Unknown names and values out of range raise ConfigError.

    Where the paper (QuantuneV2, arXiv 2501.07161) is silent, the setting says what was assumed. Several metrics are averaged,
    each scaled to sum 1 over the layers (assumed); see `bitdial.selection.layerwise.scores` for sqnr_change, whose default is
    assumed. Budgets are bytes and seconds, or shares such as "80%", which is all that latency = "macs" can take.
    """

    precisions: tuple[Precision, ...] = setting(
        ("low", "int8"),
        "What a layer may be: low, int8, bfloat16, float32. Float layers run in torch, and are no faster.",
        "LIST", _PLAN, read="words",
    )  # fmt: skip
    metric: tuple[Metric, ...] = setting(
        ("propagated",),
        "What ranks the layers: propagated (noise carried to the network's output), or local metrics: weight, activation, sqnr, "
        "mse, several joined by +, or combined for these four.",
        "NAMES", _PLAN, read="metrics",
    )  # fmt: skip
    sqnr_change: Literal["local", "output", "power", "decibel"] = setting(
        "local", "How the change in SQNR is taken; see docs/layerwise.md.", panel=_PLAN
    )
    order: Literal["density", "score"] = setting(
        "density", "Raise layers by gain per byte or second, or the most sensitive first.", panel=_PLAN
    )
    fusion: Literal["best", "default", "none", "isolated"] = setting(
        "best",
        "best: the fusion with the fewest conversions for the plan; the last two are for comparison.",
        panel=_PLAN,
    )
    low_bits: int = setting(4, "Width of low values.", "2..7", _PLAN, ge=2, le=7)
    low_bits_weights: int | None = Field(None, ge=2, le=7, description="Width of low weights, if different.")
    group_size: int = setting(16, "Feature channels that share a shift.", "N", _PLAN, ge=1, le=4096)
    weight_granularity: Literal["output", "block", "group"] = Field("group", description="As in QuantizeConfig.")
    calibration: Literal["minmax", "percentile", "mse"] = Field("mse", description="As in QuantizeConfig.")
    percentile: float = Field(99.99, gt=50.0, le=100.0, description="As in QuantizeConfig.")
    low_weights: Literal["stored", "derived"] = Field("stored", description="As in QuantizeConfig.")
    sort_channels: bool = Field(True, description="As in QuantizeConfig.")
    bias: Literal["samples", "runs", "none"] = Field(
        "samples",
        description="Means are restored from the float run's samples; from two runs more, layer by layer; or not at all.",
    )
    ignored: tuple[str, ...] = setting((), "Layers left in float32 and out of the plan (repeatable).", "PATTERN", _PLAN)
    dial: bool = setting(
        False,
        "Keep ratio 0 (low layers at 8 bits) beside 100 %, the plan; low weights then take 8 bits in the file.",
        "", _PLAN, option="--keep-dial",
    )  # fmt: skip
    lower_first_last: bool = Field(True, description="First and last layer may be low; here the scores decide.")
    lower_depthwise: bool = Field(False, description="Depthwise convolutions may be low.")
    budget_size: float | str | None = setting(
        None,
        "Largest file: 300k, 1.5MB, 200KiB, or a share of the all-int8 file's: 80%.",
        "BYTES|SHARE", _BUDGETS, read="bytes",
    )  # fmt: skip
    budget_latency: float | str | None = setting(
        None,
        "Longest time per sample: 5ms, 800us, or a share of the all-int8 plan's: 80%.",
        "TIME|SHARE", _BUDGETS, read="seconds",
    )  # fmt: skip
    latency: Literal["macs", "table", "measured"] = Field(
        "macs", description="Where times come from: multiply-accumulates, `latency_table`, or the CPU engine here."
    )
    latency_table: LatencyTableSetting | None = setting(
        None, "Times of layers measured on a target (bitdial latency-table).", "FILE", _BUDGETS, read="path"
    )
    relative_time: dict[Precision, float] = Field(
        default_factory=RELATIVE_TIME.copy,
        description="Time of a multiply-accumulate at each precision, int8 being 1: for 'macs', and for float layers by all (no "
        "engine here compiles them). Believed, not measured.",
    )
    accuracy_floor: float | None = setting(
        None,
        "Least top-1 accuracy on images of the train part that calibration does not use, e.g. 91%.",
        "SHARE", _BUDGETS, read="share", ge=0.0, le=1.0,
    )  # fmt: skip
    calibration_images: int = setting(
        256, "Calibration images, drawn by --seed from the train part (all if fewer).", "N", "Data", option="--images", ge=1
    )
    batch_size: int = setting(64, "Images per step.", "N", ge=1)
    seed: int = setting(0, "Seed of every random choice.", "N", ge=0)
    patches: int = Field(1024, ge=16, description="Samples of a layer's input, rows per layer.")
    metric_values: int = Field(65536, ge=16, description="Numbers per value that are compared between the two runs.")

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
