"""What every engine offers, and how engines are found by name. Imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from bitdial.errors import EngineError, RatioError
from bitdial.quantization.program import Program

# engine name -> module with `create(program, **options) -> Engine`
ENGINES = {"reference": "bitdial.engines.reference.engine", "cpu": "bitdial.engines.cpu.engine"}


@runtime_checkable
class Engine(Protocol):
    """A loaded model with its dial.

    run         batch (array or tensor; for several inputs a sequence of them, or a dict by name) -> output, or a tuple of
                outputs in order, however the network nests them (`QuantizedModel` gives its nesting and names back).
                `ratio` overrides the dial for this call; it is read once, at the start.
    set_ratio   one store; takes effect from the next `run`
    ratio       the dial's present setting (an entry of `ratios`)
    ratios      the ratios that the model carries tables for, ascending
    describe    JSON-able: per layer precision, groups, shifts, what runs where and why
    """

    def run(self, batch: Any, ratio: float | None = None) -> Any: ...
    def set_ratio(self, ratio: float) -> float: ...
    @property
    def ratio(self) -> float: ...
    @property
    def ratios(self) -> list[float]: ...
    def describe(self) -> dict[str, Any]: ...


def ratio_index(ratios: Sequence[float], ratio: float) -> int:
    """Index of the table entry for a ratio: the nearest at or below it, so that never more runs low than was asked for.

    Raises RatioError if `ratio` is not a number in 0..1, or lies below the smallest entry (models saved for a band).
    """
    number: object = ratio  # callers without a type checker pass anything; NumPy's floats are welcome
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not math.isfinite(ratio):
        raise RatioError(f"ratio must be a number in 0..1, got {ratio!r}")
    if not 0.0 <= ratio <= 1.0:
        raise RatioError(f"ratio {ratio} is outside 0..1 (0 = all 8-bit, 1 = all eligible channels low)")
    index = max((i for i, r in enumerate(ratios) if r <= ratio + 1e-9), default=-1)
    if index < 0:
        raise RatioError(
            f"ratio {ratio} is below this model's smallest, {ratios[0]}: it was saved for a band of ratios"
        )
    return index


def available_engines() -> dict[str, str]:
    """Engine name -> "" if it can be used here, else what is missing."""
    result = {}
    for name in ENGINES:
        result[name] = ""
        if name == "reference" and importlib.util.find_spec("torch") is None:
            result[name] = "torch is not installed: pip install bitdial[quantize]"
        elif name == "cpu":
            result[name] = importlib.import_module("bitdial.engines.cpu.native").missing()
    return result


def default_engine(program: Program, options: Sequence[str] = ()) -> str:
    """The engine for a program when none is named: the compiled one where it is there and runs the program whole or in
    part, else the reference engine. options: names of engine options given; those of the reference engine decide for it."""
    if "device" in options or program.extraction == "dynamic" or available_engines()["cpu"]:
        return "reference"
    return "cpu"


def create_engine(program: Program, engine: str | None = None, **options: Any) -> Engine:
    """Engine of that name for a program (None: see `default_engine`). Raises EngineError if it is unknown or cannot run here."""
    if engine is None:
        engine = default_engine(program, list(options))
    if engine not in ENGINES:
        raise EngineError(f"unknown engine '{engine}': choose one of {sorted(ENGINES)}")
    missing = available_engines()[engine]
    if missing:
        raise EngineError(f"engine '{engine}' cannot run: {missing}")
    created: Engine = importlib.import_module(ENGINES[engine]).create(program, **options)
    return created
