"""Methods after ERQ, IGQ-ViT and QDrop: no labels, one width for all low layers, another copy of the weights per width."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bitdial.engines.base import Engine
from bitdial.quantization.program import Program
from comparison import switching
from comparison.budget import HIGH_BITS
from comparison.erq import reduced_program
from comparison.ground import Ground, Settings
from comparison.instance_groups import calibrated_quantizers, grouped_program
from comparison.methods import Builder, Built, Method, describe, point, register
from comparison.qdrop import dropped_program

Made = tuple[Program, Engine | None, dict[str, Any]]  # a program, what runs it if not every engine does, figures
Make = Callable[[Ground, Settings, Sequence[int]], dict[int, Made]]


def _erq(ground: Ground, settings: Settings, widths: Sequence[int]) -> dict[int, Made]:
    return {bits: (reduced_program(ground, bits), None, {}) for bits in widths}


def _igq(ground: Ground, settings: Settings, widths: Sequence[int]) -> dict[int, Made]:
    quantizers = calibrated_quantizers(ground, ground.layers)
    made: dict[int, Made] = {}
    for bits in widths:
        program, engine = grouped_program(ground, quantizers, bits)
        made[bits] = program, engine, {}
    return made


def _qdrop(ground: Ground, settings: Settings, widths: Sequence[int]) -> dict[int, Made]:
    made: dict[int, Made] = {}
    for bits in widths:
        program, figures = dropped_program(
            ground, bits, iterations=settings.iterations, batch_size=settings.reconstruction_batch,
            rate=settings.rounding_rate,
        )  # fmt: skip
        made[bits] = program, None, {f"{bits} bits": figures}
    return made


def _builder(name: str, make: Make) -> Builder:
    def build(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
        started = time.perf_counter()
        made = make(ground, settings, [int(b) for b in averages if b != HIGH_BITS])
        points, details = [], {}
        for b in averages:
            program, engine, figures = made.get(int(b), (ground.eight, None, {}))
            describe(program, name, ground, b)
            points.append(point(program, b, engine=engine))
            details.update(figures)
        programs = [p.program for p in points]
        cost = switching.copies(programs) if len(programs) > 1 else switching.one_model()
        return Built(name, tuple(points), time.perf_counter() - started, cost, details)

    return build


register(Method("erq", "ERQ-like", "Zhong et al. 2024", False, "uniform", _builder("erq", _erq)))
register(
    Method(
        "igq", "IGQ-ViT-like (simulated)", "Moon et al. 2024", False, "uniform", _builder("igq", _igq), simulated=True
    )  # fmt: skip
)
register(Method("qdrop", "QDrop-like", "Wei et al. 2022", False, "uniform", _builder("qdrop", _qdrop)))
