"""The rows of the comparison of methods: which method, with which numbers, trained or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitdial.errors import ConfigError
from comparison import METHODS

AVERAGES = (4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class Row:
    """One method under one setting; measured once per seed. settings: of `comparison.Settings`; trained: uses
    --epochs of training data."""

    name: str
    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False


def all_rows() -> list[Row]:
    """All rows in the order of work: what is quick and what matters most first."""
    rows = [
        Row("bitdial", "bitdial", "bitdial"),
        Row("uniform", "uniform", "uniform"),
        Row("naive", "naive extraction", "naive"),
        Row("sqnr", "practical mixed precision", "sqnr"),
        Row("hawq", "HAWQ-style", "hawq"),
        Row("csmpq", "CSMPQ", "csmpq"),
        Row("uniform.gptq", "uniform, GPTQ rounding", "uniform", {"rounding": "compensated"}),
        Row("sqnr.effective", "practical mixed precision, effective bits", "sqnr", {"numbers": "effective"}),
        Row("hawq.effective", "HAWQ-style, effective bits", "hawq", {"numbers": "effective"}),
        Row("csmpq.effective", "CSMPQ, effective bits", "csmpq", {"numbers": "effective"}),
    ]
    known = {row.method for row in rows}
    rows += [Row(m.name, m.label, m.name, {}, m.trains) for m in METHODS.values() if m.name not in known]
    return rows


def choose_rows(text: str | None, trained: bool) -> list[Row]:
    """The rows named in a comma-separated text, in the order of work; None is all (those that train only if `trained`).

    Raises ConfigError.
    """
    rows = all_rows()
    if text is None:
        return [row for row in rows if trained or not row.trained]
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in {row.name for row in rows}]
    if unknown or not wanted:
        raise ConfigError(f"--rows: {', '.join(unknown) or 'nothing'} does not exist; --list shows all rows")
    chosen = [row for row in rows if row.name in wanted]
    without = [row.name for row in chosen if row.trained and not trained]
    if without:
        raise ConfigError(f"--rows: {', '.join(without)} trains: give --epochs of at least 1")
    return chosen


def seeded(name: str, seed: int) -> str:
    """The name under which a row's figures for a seed are stored."""
    return name if seed == 0 else f"{name}.seed{seed}"
