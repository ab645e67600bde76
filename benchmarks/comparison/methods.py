"""The methods by name, and how to build each of them on one prepared network.

    ground = Ground(prepared, config)
    built = build_all("hawq", ground, (4, 5, 6, 8))
    built.points[1].program           # an ordinary program, for any engine, to be saved as any other
    program = build("csmpq", prepared, config, 5.0)

Every method starts from the same folded graph, calibration images and 8-bit ranges, leaves first and last layers, depthwise
convolutions and products of activations at 8 bits, and has its means restored by the same bias correction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bitdial.engines.base import Engine
from bitdial.errors import ConfigError
from bitdial.pipeline import Prepared, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from comparison import switching
from comparison.budget import average_bits, low_share
from comparison.ground import Ground, Settings
from comparison.layerwise import (
    LayerPlan,
    dial_of,
    hawq_plan,
    masks_at,
    program_of,
    separability_plan,
    sqnr_plan,
)
from comparison.switching import Switching
from comparison.uniform import uniform_program


@dataclass(frozen=True)
class Point:
    """A method at one average width: the program, the ratio to run it at, the average asked for and the one reached.

    engine: what alone gives the method's outputs, for one that no program can say (`Method.simulated`).
    """

    asked: float
    reached: float
    program: Program
    ratio: float
    engine: Engine | None = None


@dataclass(frozen=True)
class Built:
    """What a method made. seconds: preparation beyond the shared 8-bit start. details: JSON-able, e.g. layer scores."""

    method: str
    points: tuple[Point, ...]
    seconds: float
    switching: Switching
    details: dict[str, Any] = field(default_factory=dict)

    def at(self, bits: float) -> Point:
        """The point asked for at an average width. Raises ConfigError."""
        for point in self.points:
            if abs(point.asked - bits) < 1e-9:
                return point
        raise ConfigError(f"'{self.method}' was not built at an average of {bits} bits")


Builder = Callable[[Ground, Settings, Sequence[float]], Built]


@dataclass(frozen=True)
class Method:
    """A method to compare with.

    label    for tables
    source   the paper
    trains   changes weights by gradient descent
    widths   averages it can make: "any" of 4 to 8, or only whole "uniform" widths (5 and 6 bits then mean multiplies of
             5 and 6 bits, which common hardware does at the speed of 8)
    build    (ground, settings, averages) -> Built
    simulated  no engine executes it: its narrow numbers are made in float and multiplied as 8-bit ones
    """

    name: str
    label: str
    source: str
    trains: bool
    widths: str
    build: Builder
    simulated: bool = False

    def supports(self, bits: float) -> bool:
        return 4.0 <= bits <= 8.0 and (self.widths == "any" or float(bits).is_integer())


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method. Raises ConfigError if the name is taken."""
    if method.name in METHODS:
        raise ConfigError(f"a method named '{method.name}' is registered already")
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """The method of that name. Raises ConfigError, naming those there are."""
    if name not in METHODS:
        raise ConfigError(f"there is no method '{name}' to compare with; there are {', '.join(METHODS)}")
    return METHODS[name]


def build_all(
    name: str, ground: Ground, averages: Sequence[float] = (4.0, 5.0, 6.0, 8.0), settings: Settings | None = None
) -> Built:
    """Build a method at all of these average widths; what is common to them is done once. Raises ConfigError."""
    method = get_method(name)
    wrong = [b for b in averages if not method.supports(b)]
    if wrong or not averages:
        raise ConfigError(f"'{name}' cannot make an average of {wrong or 'no'} bits: it makes {method.widths} widths of 4 to 8")
    _ = ground.eight  # the shared start is nobody's preparation time
    return method.build(ground, settings or Settings(), tuple(float(b) for b in averages))


def build(
    method: str,
    prepared: Prepared,
    config: QuantizeConfig,
    average_bits: float,
    *,
    settings: Settings | None = None,
    ground: Ground | None = None,
) -> Program:
    """One program of a method at an average width over the low-eligible multiply-accumulates, at its last ratio.

    ground: pass one to share the work of several calls (and labels); prepared and config are ignored then. Raises
    ConfigError for an unknown method or an average it cannot make, SelectionError where no layer may run low.
    """
    own = Ground(prepared, config) if ground is None else ground
    return build_all(method, own, (average_bits,), settings).points[0].program


# -- methods without training -------------------------------------------------------------------------------------------


def point(program: Program, asked: float, ratio: float | None = None, engine: Engine | None = None) -> Point:
    """A point at a ratio of the program's table (its last)."""
    chosen = program.ratios[-1] if ratio is None else ratio
    return Point(asked, average_bits(program, program.ratios.index(chosen)), program, chosen, engine)


def _build_uniform(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    started = time.perf_counter()
    points = []
    for bits in averages:
        masks = ground.full_masks()
        program = (
            ground.eight
            if bits == 8
            else uniform_program(ground.prepared, ground.config, masks, int(bits), settings.rounding)
        )
        describe(program, "uniform", ground, bits)
        points.append(point(program, bits))
    programs = [p.program for p in points]
    cost = switching.copies(programs) if len(programs) > 1 else switching.one_model()
    return Built("uniform", tuple(points), time.perf_counter() - started, cost)


def _build_bitdial(ground: Ground, averages: Sequence[float], name: str, **changes: Any) -> Built:
    started = time.perf_counter()
    ratios = tuple(sorted(low_share(b) for b in averages))
    config = ground.config.updated(ratios=ratios, **changes)
    program = quantize_prepared(ground.prepared, config, progress=ground.progress)
    program.provenance["comparison"] = {"method": name}
    points = tuple(point(program, b, low_share(b)) for b in averages)
    return Built(name, points, time.perf_counter() - started, switching.dial(program))


def _bitdial(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    return _build_bitdial(ground, averages, "bitdial")


def _naive(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    return _build_bitdial(ground, averages, "naive", extraction="naive")


def _layerwise(name: str, make: Callable[[Ground, Settings], LayerPlan]) -> Builder:
    def build_layerwise(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
        started = time.perf_counter()
        plan = make(ground, settings)
        masks = {b: masks_at(ground, settings, plan, b) for b in averages}
        if settings.numbers == "effective":
            low = sorted((b for b in averages if b < 8), reverse=True)
            program = dial_of(ground, [masks[b] for b in low], [low_share(b) for b in low])
            describe(program, name, ground, low[-1] if low else 8.0, settings)
            points = tuple(point(program, b, low_share(b)) for b in averages)
            cost = switching.dial(program)
        else:
            made = []
            for b in averages:
                program = program_of(ground, settings, masks[b]) if b < 8 else ground.eight
                describe(program, name, ground, b, settings)
                made.append(point(program, b))
            points = tuple(made)
            cost = switching.copies([p.program for p in points]) if len(points) > 1 else switching.one_model()
        seconds = time.perf_counter() - started
        details = {
            "scores": plan.scores,
            "sensitivity_seconds": plan.seconds,
            "low": {f"{b:g}": {n: float(m.mean()) for n, m in masks[b].items() if m.any()} for b in averages},
        }
        return Built(name, points, seconds, cost, details)

    return build_layerwise


def describe(program: Program, name: str, ground: Ground, bits: float, settings: Settings | None = None) -> None:
    """Provenance as the pipeline writes it, as far as it applies."""
    from bitdial._version import __version__

    program.provenance = {
        **program.provenance,
        "bitdial": __version__,
        "torch": torch.__version__,
        "config": ground.config.model_dump(mode="json"),
        "seed": ground.config.seed,
        "comparison": {
            "method": name,
            "average_bits": bits,
            **({} if settings is None else {"numbers": settings.numbers, "rounding": settings.rounding}),
        },
    }


register(Method("bitdial", "bitdial", "Kim et al. 2026", False, "any", _bitdial))
register(Method("uniform", "uniform", "per-channel weights, ranges of least squared error", False, "uniform", _build_uniform))
register(Method("naive", "naive extraction", "Kim et al. 2026, baseline", False, "any", _naive))
register(Method("sqnr", "practical mixed precision", "Pandey et al. 2023", False, "any", _layerwise("sqnr", sqnr_plan)))
register(Method("hawq", "HAWQ-style", "Dong et al. 2020, Yao et al. 2021", False, "any", _layerwise("hawq", hawq_plan)))
register(Method("csmpq", "CSMPQ", "Wang et al. 2022", False, "any", _layerwise("csmpq", separability_plan)))
