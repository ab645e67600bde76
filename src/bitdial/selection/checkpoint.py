"""Saving and resuming an evolutionary search: one JSON file, replaced atomically. NumPy only, no pickle.

A search is resumed only if problem, targets, settings and seed are those of the checkpoint; then its result equals that
of an uninterrupted search exactly, since the random generator's state, the population and the remembered fitness values
are all stored.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.errors import SelectionError
from bitdial.files import write_atomically
from bitdial.selection.problem import BoolArray, FloatArray
from bitdial.selection.scoring import pack, unpack

FORMAT = "bitdial-selection-checkpoint"
VERSION = 1
HISTORY_KEYS = ("target", "generation", "best", "mean", "n_images", "evaluations")


@dataclass(eq=False)
class Generation:
    """A population after it was scored.

    index       0 for the initial population
    population  bool [n, n_groups]
    fitness     float64 [n]
    n_images    what it was scored on
    rng         the generator that makes the next generation
    """

    index: int
    population: BoolArray
    fitness: FloatArray
    n_images: int
    rng: np.random.Generator


@dataclass(eq=False)
class SearchState:
    """All that a search needs to go on. `masks` and the two fitness lists hold the targets solved so far; `costs` is what the
    caller counts (see `Selector.select`)."""

    masks: list[BoolArray] = field(default_factory=list)
    fitness: list[float] = field(default_factory=list)
    greedy_fitness: list[float] = field(default_factory=list)
    current: Generation | None = None
    memory: dict[bytes, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    image_evaluations: int = 0
    cache_hits: int = 0
    seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)


def save_checkpoint(path: Path, identity: dict[str, Any], state: SearchState) -> None:
    """Write the state to a temporary file beside `path`, flush it to disk and rename it, so that `path` is never half
    written.

    identity: JSON-able, with the entry "targets"; what a resuming search must agree on, by name.
    Raises OutputError if the file cannot be written.
    """
    current = state.current
    data = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "masks": [_encode(pack(mask)) for mask in state.masks],
        "fitness": state.fitness,
        "greedy_fitness": state.greedy_fitness,
        "current": None
        if current is None
        else {
            "index": current.index,
            "population": [_encode(pack(mask)) for mask in current.population],
            "fitness": current.fitness.tolist(),
            "n_images": current.n_images,
            "rng": current.rng.bit_generator.state,
            "memory": {_encode(key): value for key, value in state.memory.items()},
        },
        "history": state.history,
        "evaluations": state.evaluations,
        "image_evaluations": state.image_evaluations,
        "cache_hits": state.cache_hits,
        "seconds": state.seconds,
        "costs": state.costs,
    }
    write_atomically(path, json.dumps(data, allow_nan=False).encode(), "the search checkpoint")


def load_checkpoint(path: Path, identity: dict[str, Any], n_groups: int) -> SearchState | None:
    """The state saved at `path`, or None if there is no such file.

    Raises SelectionError if the file is unreadable, not a checkpoint of this version, damaged, or of another search
    (the message then names what differs).
    """
    remedy = "delete it to start anew, or give another path"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SelectionError(f"cannot read the search checkpoint {path} ({error}); {remedy}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SelectionError(f"the search checkpoint {path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SelectionError(f"{path} is not a search checkpoint of bitdial; give another path")
    if data.get("version") != VERSION:
        raise SelectionError(
            f"the search checkpoint {path} has version {data.get('version')!r}, this bitdial reads {VERSION}; {remedy}"
        )
    stored = data.get("identity")
    wanted = json.loads(json.dumps(identity))
    if not isinstance(stored, dict) or stored != wanted:
        stored = stored if isinstance(stored, dict) else {}
        names = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
        raise SelectionError(
            f"the search checkpoint {path} belongs to another search: {', '.join(names)} differ; repeat that search's "
            f"settings, or {remedy}"
        )
    try:
        return _decode_state(data, n_groups, len(wanted["targets"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, binascii.Error) as error:
        raise SelectionError(f"the search checkpoint {path} is damaged ({error!r}); {remedy}") from error


def _decode_state(data: dict[str, Any], n_groups: int, n_targets: int) -> SearchState:
    state = SearchState(
        masks=[unpack(_decode(row), n_groups) for row in data["masks"]],
        fitness=[_finite(f) for f in data["fitness"]],
        greedy_fitness=[_finite(f) for f in data["greedy_fitness"]],
        history=[_history_row(row) for row in data["history"]],
        evaluations=_count(data["evaluations"]),
        image_evaluations=_count(data["image_evaluations"]),
        cache_hits=_count(data["cache_hits"]),
        seconds=_finite(data["seconds"]),
        costs={str(key): _finite(value) for key, value in data.get("costs", {}).items()},  # absent in older files
    )
    if not len(state.masks) == len(state.fitness) == len(state.greedy_fitness) <= n_targets:
        raise ValueError("masks, fitness and targets do not agree in number")
    current = data["current"]
    if current is not None:
        bit_generator = np.random.PCG64()
        bit_generator.state = current["rng"]
        rows = [unpack(_decode(row), n_groups) for row in current["population"]]
        fitness = np.array([_finite(f) for f in current["fitness"]], dtype=np.float64)
        if not rows or len(rows) != len(fitness):
            raise ValueError("population and fitness differ in number")
        generator = np.random.Generator(bit_generator)
        state.current = Generation(
            _count(current["index"]), np.stack(rows), fitness, _count(current["n_images"]), generator
        )
        state.memory = {_decode(key): _finite(value) for key, value in current["memory"].items()}
    return state


def _encode(packed: bytes) -> str:
    return base64.b64encode(packed).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _history_row(row: Any) -> dict[str, Any]:
    return {key: row[key] for key in HISTORY_KEYS}
