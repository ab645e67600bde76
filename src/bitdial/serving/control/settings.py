"""How a model is served: what the scheduler keeps to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bitdial.errors import ConfigError
from bitdial.serving.control.table import ServiceTable
from bitdial.settings import BaseConfig, setting

DIAL, BATCHING = "The dial", "Batching and limits"  # panels of the command line

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseConfig):
    """How a model is served, in seconds. What has no time in it is also an option of the command line, which
    `server.config.ModelOptions` takes from here; times are given there in milliseconds."""

    slo: Positive = Field(default=0.1, description="An answer should be ready so soon after its request came.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="A request that cannot be answered so soon is dropped; None: the SLO."
    )
    max_batch: int = setting(
        32, "Samples of the largest batch, and of the largest request.", "N", BATCHING, ge=1, le=4096
    )
    max_wait: float = Field(
        default=0.0, ge=0, allow_inf_nan=False,
        description="How long a batch that is not full waits for more requests while a worker is free.",
    )  # fmt: skip
    max_queue: int = setting(1024, "Requests that may wait; more get 503.", "N", BATCHING, ge=1, le=1_000_000)
    max_ratio: Share | None = setting(
        None,
        "Never turn the dial further, e.g. 50% or 0.5. Default: the ceiling that quantizing found, if it found one.",
        "SHARE", DIAL, read="share",
    )  # fmt: skip
    min_accuracy: Share | None = setting(
        None, "Nor to a ratio whose expected accuracy, by the stored curve, is lower.", "SHARE", DIAL, read="share"
    )
    refuse_late: bool = Field(
        default=True, description="Refuse at once what could not be answered in time even at the top ratio."
    )

    def allowed(self, table: ServiceTable) -> list[int]:
        """Ratio indices within max_ratio and min_accuracy, ascending. Raises ConfigError if none is."""
        limit = self._limit(table)
        allowed = list(range(table.at_or_below(limit) + 1))
        if not allowed:
            raise ConfigError(f"max_ratio {limit} is below the model's smallest ratio, {table.ratios[0]}")
        if self.min_accuracy is not None:
            expected = table.expected
            if any(expected[i] is None for i in allowed):
                raise ConfigError(
                    "min_accuracy needs a measured accuracy at every ratio, and the model has none: quantize with evaluation "
                    "data, or limit the dial with max_ratio"
                )
            kept = [i for i in allowed if (expected[i] or 0.0) >= self.min_accuracy]
            if not kept:
                raise ConfigError(
                    f"min_accuracy {self.min_accuracy} is above what any ratio reaches (at most {expected[allowed[0]]}; a higher "
                    "accuracy at a higher ratio counts as noise)"
                )
            allowed = kept
        return allowed

    def _limit(self, table: ServiceTable) -> float:
        if self.max_ratio is not None:
            return self.max_ratio
        # A ceiling below a band's smallest ratio leaves that one: something must run.
        return 1.0 if table.ceiling is None else max(table.ceiling, table.ratios[0])

    def bound_by(self, table: ServiceTable) -> str:
        """What keeps the dial from the table's last ratio: "min_accuracy", "max_ratio", "model file" (its ceiling), or "" if
        nothing does."""
        top = self.allowed(table)[-1]
        if top == len(table.ratios) - 1:
            return ""
        if table.ratios[top + 1] <= self._limit(table) + 1e-9:
            return "min_accuracy"
        return "model file" if self.max_ratio is None else "max_ratio"
