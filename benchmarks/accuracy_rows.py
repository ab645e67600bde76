"""The rows of the accuracy benchmark: the default configuration, and one factor changed at a time.

The rows follow the defaults of `QuantizeConfig`: of every factor, the values that are not the default make a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitdial.errors import ConfigError
from bitdial.quantization.config import QuantizeConfig
from common import PAPER

CURVE = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIR = (0.0, 0.5, 1.0)
SEEDS = (1, 2)  # beside 0, the default

# Settings that do not reach `pipeline.prepare`; all others, also ones added later, get a preparation of their own.
AFTER_PREPARE = frozenset(
    "ratios selector target low_bits low_bits_weights extraction shift_choice weight_granularity bias_correction nested "
    "low_weights search search_images population generations survivors seed".split()
)

# (setting, values tried); an entry whose setting does not exist is skipped.
_FACTORS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("group_size", (8, 16, 32)),
    ("extraction", ("static", "dynamic")),
    ("shift_choice", ("least_squares", "value_error", "plain")),
    ("low_weights", ("stored", "derived")),
    ("search", ("predicted", "exact")),
    ("bias_correction", (True, False)),
    ("sort_channels", (True, False)),
    ("weight_granularity", ("output", "block", "group")),
    ("low_bits", (4, 5, 6)),
    ("calibration", ("mse", "minmax", "percentile")),
    ("equalize", (None, 0.5, 1.0)),
)


@dataclass(frozen=True)
class Row:
    """One configuration. changes: settings that differ from the default; seed: of selection and calibration subset."""

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    ratios: tuple[float, ...] = PAIR
    seed: int = 0


def default_of(setting: str) -> Any:
    return PAPER.get(setting, QuantizeConfig.model_fields[setting].default)


def accuracy_rows() -> list[Row]:
    """All rows in the order of work: what matters most comes first, so that partial results are of use."""
    fields = QuantizeConfig.model_fields
    rows = [Row("baseline", "default", ratios=CURVE)]
    selectors = [s for s in ("greedy", "random") if s != default_of("selector")]
    rows += [Row(s, f"selector {s}", {"selector": s}, CURVE) for s in selectors]
    rows.append(Row("naive", "extraction naive", {"extraction": "naive"}))
    # The same table of ratios as all rows below: at 25 % nothing was fixed before 50 % was solved.
    rows.append(Row("baseline_pair", "default, table of 50 and 100 % only"))
    for setting, values in _FACTORS:
        if setting not in fields:
            continue
        for value in values:
            if value != default_of(setting):
                rows.append(Row(f"{setting}={_shown(value)}", f"{setting} {_shown(value)}", {setting: value}))
    crude = {"extraction": "naive", "bias_correction": False, "sort_channels": False, "selector": "greedy"}
    if "equalize" in fields:
        crude["equalize"] = None
    rows.append(Row("crude", "naive, greedy, no bias correction, no sorting", crude))
    for seed in SEEDS:
        rows.append(Row(f"baseline.seed{seed}", f"default, seed {seed}", ratios=CURVE, seed=seed))
        rows += [Row(f"{s}.seed{seed}", f"selector {s}, seed {seed}", {"selector": s}, CURVE, seed) for s in selectors]
    return rows


def _shown(value: Any) -> str:
    if value is None or value is False:
        return "off"
    return "on" if value is True else str(value)


def choose_rows(text: str | None) -> list[Row]:
    """The rows named in a comma-separated text, in the order of work; None is all. Raises ConfigError."""
    rows = accuracy_rows()
    if text is None:
        return rows
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    known = {row.name for row in rows}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(f"--rows: {', '.join(unknown) or 'nothing'} does not exist; --list shows all rows")
    return [row for row in rows if row.name in wanted]


def preparation_key(config: QuantizeConfig, calibration_seed: int) -> str:
    """Equal for configurations that may share one `pipeline.prepare`."""
    kept = {k: v for k, v in sorted(config.model_dump(mode="json").items()) if k not in AFTER_PREPARE}
    return f"{calibration_seed} {kept}"
