"""`bitdial evaluate`: the accuracy curve of a .bitdial file on data."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from bitdial.cli import machine, options, reading
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, duration
from bitdial.errors import ConfigError


@command
def evaluate(
    *,
    model: options.Model,
    data: options.Data,
    ratios: Annotated[
        str | None,
        option(
            "--ratios", "LIST",
            "Settings of the dial, e.g. 0,50,100 or 0,0.5,1 (above 1: percent). Default: all the model has.",
        ),
    ] = None,
    split: Annotated[
        Literal["train", "test", "all"], option("--split", "train|test|all", "Part of the data.")
    ] = "test",
    images: options.Images = None,
    engine: options.EngineName = "reference",
    batch_size: options.BatchSize = 100,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Measure accuracy, and agreement with the 8-bit model, at each setting of the dial."""
    wanted = reading.parse_ratios(ratios) if ratios is not None else None
    if "data" not in data:
        raise ConfigError("evaluate needs --data: the images to measure on")
    from bitdial.api import load
    from bitdial.cli.data import Batches, DataOptions
    from bitdial.cli.measure import measure_curve, print_curve, table_ratios

    machine.set_threads(threads)
    quantized = load(model, engine, **engine_options(engine, threads))
    program = quantized.program
    chosen = table_ratios(program, wanted)
    if wanted is not None and list(wanted) != chosen:
        have = ", ".join(f"{100 * r:.4g}" for r in program.ratios)
        terminal.note(f"note: the model has the ratios {have} %; the nearest at or below those asked for are used")
    given = DataOptions(**data)
    stored = program.provenance.get("source") or {}
    used, record = given.drawn(split, images, seed, stored, program)
    started = time.perf_counter()
    with terminal.progress() as progress:
        rows = measure_curve(quantized, Batches(used, batch_size), chosen, progress)
    seconds = time.perf_counter() - started
    print_curve(terminal, rows, [], program.ratios[0], f"{model.name} on {len(used)} images of {record['data']}")
    terminal.say(f"{len(used)} of {record['of']} {split} images, engine {engine}, {duration(seconds)}")
    terminal.emit(
        {
            "command": "evaluate",
            "model": str(model),
            "engine": engine,
            "data": record,
            "agreement_against": program.ratios[0],
            "curve": rows,
            "seconds": seconds,
        }
    )


def engine_options(engine: str, threads: int | None) -> dict[str, Any]:
    """Options of an engine that is to measure accuracy: all cores, and no time spent on choosing kernels."""
    from bitdial.engines.base import engine_spec

    return engine_spec(engine).accepted({"threads": threads or machine.usable_cores(), "kernels": "fixed"})
