"""What every engine offers, and how engines are found by name. Imports no torch."""

from __future__ import annotations

import functools
import importlib
import math
import numbers
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bitdial.errors import EngineError, RatioError
from bitdial.quantization.curve import at_or_below
from bitdial.quantization.program import Program


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
    index = at_or_below(ratios, ratio)
    if index < 0:
        raise RatioError(
            f"ratio {ratio} is below this model's smallest, {ratios[0]}: it was saved for a band of ratios"
        )
    return index


class Dial:
    """The dial of an engine that keeps no other state: the index of a ratio of its program, read once per run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._index = 0

    @property
    def ratios(self) -> list[float]:
        return list(self.program.ratios)

    @property
    def ratio(self) -> float:
        return self.program.ratios[self._index]

    def set_ratio(self, ratio: float) -> float:
        """Turn the dial: one store. Returns the table's ratio that is now in force. Raises RatioError."""
        self._index = ratio_index(self.program.ratios, ratio)
        return self.program.ratios[self._index]

    def index(self, ratio: float | None) -> int:
        """Index of a ratio asked for; of the dial's own for None. Raises RatioError."""
        return self._index if ratio is None else ratio_index(self.program.ratios, ratio)


@dataclass(frozen=True)
class EngineSpec:
    """What the folder of an engine exports as SPEC; importing it must not import what the engine needs.

    name      as users write it
    compiled  made for speed: taken by default where it can run, and what is measured; the others define results
    options   names that `create` takes
    missing   () -> "" if it can be used on this machine, else what is missing and how to get it
    create    (program, **options) -> Engine
    can_run   (program) -> "" or why it cannot run this one
    by_name   taken only where it is asked for by name
    note      what users should know of it, "" for nothing
    modelled  its times are those of a model of a machine that is not here
    """

    name: str
    compiled: bool
    options: frozenset[str]
    missing: Callable[[], str]
    create: Callable[..., Engine]
    can_run: Callable[[Program], str] = lambda program: ""
    by_name: bool = False
    note: str = ""
    modelled: bool = False

    def accepted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that this engine has."""
        return {name: value for name, value in options.items() if name in self.options}


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function or class of a module that is imported when it is called: for what a spec must not import."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call


@functools.cache
def engine_specs() -> dict[str, EngineSpec]:
    """Every engine by name, compiled ones first, modelled ones last: each folder beside this file exports a SPEC."""
    package = importlib.import_module("bitdial.engines")
    folders = pkgutil.iter_modules(package.__path__, "bitdial.engines.")
    modules = [importlib.import_module(folder.name) for folder in folders if folder.ispkg]
    specs: list[EngineSpec] = [module.SPEC for module in modules]
    return {spec.name: spec for spec in sorted(specs, key=lambda s: (s.modelled, not s.compiled, s.name))}


def engine_spec(name: str) -> EngineSpec:
    """The engine of that name. Raises EngineError if there is none."""
    specs = engine_specs()
    if name not in specs:
        raise EngineError(f"unknown engine '{name}': choose one of {sorted(specs)}")
    return specs[name]


def available_engines(modelled: bool = True) -> dict[str, str]:
    """Engine name -> "" if it can be used here, else what is missing. modelled: those whose time is a model's, too."""
    return {name: spec.missing() for name, spec in engine_specs().items() if modelled or not spec.modelled}


def _able(program: Program) -> list[EngineSpec]:
    """Engines that need not be asked for, are there and run the program, compiled ones first."""
    return [s for s in engine_specs().values() if not s.by_name and not s.missing() and not s.can_run(program)]


def default_engine(program: Program, options: Sequence[str] = ()) -> str:
    """The engine for a program when none is named: the first that is there, runs the program whole or in part, and has the
    options given, if any has; compiled ones come first, and those taken only by name not at all."""
    able = _able(program)
    fitting = [s for s in able if s.options.issuperset(options)]
    return (fitting or able or [engine_spec("reference")])[0].name


def defining_engine(program: Program) -> Engine:
    """An engine to compare others with: the reference engine, or, without torch, a compiled one that gives the same bits."""
    able = _able(program)
    spec = min(able, key=lambda s: s.compiled, default=engine_spec("reference"))
    return create_engine(program, spec.name)


def create_engine(program: Program, engine: str | None = None, **options: Any) -> Engine:
    """Engine of that name for a program (None: see `default_engine`). Raises EngineError if it is unknown or cannot run here."""
    spec = engine_spec(default_engine(program, list(options)) if engine is None else engine)
    missing = spec.missing()
    if missing:
        raise EngineError(f"engine '{spec.name}' cannot run: {missing}")
    unknown = sorted(options.keys() - spec.options)
    if unknown:
        raise EngineError(f"the {spec.name} engine has no option {unknown}; it takes {sorted(spec.options)}")
    if program.lengths:
        from bitdial.engines.lengths import LengthsEngine

        return LengthsEngine(program, lambda own: spec.create(own, **options))
    return spec.create(program, **options)
