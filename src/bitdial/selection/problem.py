"""What a selector is given and what it returns: layers, groups, error scores, multiply-accumulates. NumPy only.

A *mask* is bool [n_groups], the groups of all low-eligible layers concatenated in network order; True means low.
Source: design notes, section 2.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bitdial.errors import RatioError, SelectionError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class SelectionProblem:
    """The low-eligible layers of a network and what extracting each of their groups costs and brings.

    layer_names  in network order, no name twice
    scores       per layer float64 [groups of the layer]: believed error of extracting the group, >= 0, smaller = cheaper;
                 comparable between layers as far as the caller can make it so (see `rescale_scores`)
    macs         per layer int64 [groups of the layer]: multiply-accumulates per sample, > 0

    The arrays are copied and made read-only. Raises SelectionError if they contradict each other, are empty, or hold
    negative or non-finite scores or MACs below 1.
    """

    layer_names: tuple[str, ...]
    scores: tuple[FloatArray, ...]
    macs: tuple[IntArray, ...]

    def __post_init__(self) -> None:
        names = tuple(self.layer_names)
        if not names:
            raise SelectionError(
                "no layer may run low, nothing to select: loosen `keep_8bit` or `ignored`, or use a network "
                "with more than a first and a last layer"
            )
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise SelectionError(f"layer names must differ, these appear more than once: {', '.join(twice)}")
        if len(self.scores) != len(names) or len(self.macs) != len(names):
            raise SelectionError(
                f"{len(names)} layers, but scores for {len(self.scores)} and MACs for {len(self.macs)}: give one array "
                "of each per layer"
            )
        pairs = [
            _checked_layer(name, scores, macs) for name, scores, macs in zip(names, self.scores, self.macs, strict=True)
        ]
        object.__setattr__(self, "layer_names", names)
        object.__setattr__(self, "scores", tuple(pair[0] for pair in pairs))
        object.__setattr__(self, "macs", tuple(pair[1] for pair in pairs))
        if sum(int(m.sum()) for m in self.macs) >= 2**53:
            raise SelectionError(
                "the MACs of all layers add up to 2^53 or more: count them per sample, not per data set"
            )

    @property
    def n_layers(self) -> int:
        return len(self.layer_names)

    @cached_property
    def n_groups(self) -> int:
        """Number of groups over all layers, the length of a mask."""
        return sum(len(s) for s in self.scores)

    @cached_property
    def layer_slices(self) -> tuple[slice, ...]:
        """Per layer the slice of its groups within a mask."""
        ends = np.cumsum([len(s) for s in self.scores]).tolist()
        starts = [0, *ends[:-1]]
        return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))

    @cached_property
    def layer_index(self) -> IntArray:
        """int64 [n_groups]: index of the layer each group belongs to."""
        return _frozen(np.repeat(np.arange(self.n_layers, dtype=np.int64), [len(s) for s in self.scores]))

    @cached_property
    def flat_scores(self) -> FloatArray:
        """float64 [n_groups]: scores of all layers, concatenated."""
        return _frozen(np.concatenate(self.scores))

    @cached_property
    def flat_macs(self) -> IntArray:
        """int64 [n_groups]: MACs of all layers, concatenated."""
        return _frozen(np.concatenate(self.macs))

    @cached_property
    def total_macs(self) -> int:
        """MACs per sample of all low-eligible groups."""
        return int(self.flat_macs.sum())

    def check_mask(self, mask: BoolArray) -> None:
        """Raises SelectionError unless `mask` is bool [n_groups]."""
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.n_groups,):
            got = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise SelectionError(f"a mask must be bool[{self.n_groups}] (one entry per group of all layers), got {got}")

    def share(self, mask: BoolArray) -> float:
        """Share (0..1) of the low-eligible MACs that a mask runs low. Raises SelectionError for a malformed mask."""
        self.check_mask(mask)
        return int(self.flat_macs[mask].sum()) / self.total_macs

    def split(self, mask: BoolArray) -> tuple[BoolArray, ...]:
        """A mask cut into one bool [groups of the layer] per layer. Raises SelectionError for a malformed mask."""
        self.check_mask(mask)
        return tuple(mask[part] for part in self.layer_slices)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over names, scores and MACs: equal for equal problems, on every machine."""
        state = hashlib.sha256()
        for name, scores, macs in zip(self.layer_names, self.scores, self.macs, strict=True):
            encoded = name.encode()
            state.update(len(encoded).to_bytes(8, "little") + encoded + len(scores).to_bytes(8, "little"))
            state.update(scores.astype("<f8").tobytes())
            state.update(macs.astype("<i8").tobytes())
        return state.hexdigest()


def _checked_layer(name: str, scores: Any, macs: Any) -> tuple[FloatArray, IntArray]:
    scores, macs = np.asarray(scores), np.asarray(macs)
    if scores.ndim != 1 or macs.shape != scores.shape or len(scores) == 0:
        raise SelectionError(
            f"layer {name!r}: scores {list(scores.shape)} and MACs {list(macs.shape)} must be vectors of equal length, "
            "one entry per group, at least one group"
        )
    if scores.dtype.kind not in "fiu" or not np.isfinite(scores).all() or (scores < 0).any():
        raise SelectionError(f"layer {name!r}: scores must be finite numbers >= 0; check the calibration data")
    if macs.dtype.kind not in "iu" or (macs < 1).any():
        raise SelectionError(f"layer {name!r}: MACs must be integers >= 1; drop groups that multiply nothing")
    return _frozen(np.array(scores, dtype=np.float64)), _frozen(np.array(macs, dtype=np.int64))


def _frozen(array: npt.NDArray[T]) -> npt.NDArray[T]:
    array.flags.writeable = False
    return array


class Evaluate(Protocol):
    """Scores candidates; the selectors know no engine.

    masks: bool [n_candidates, n_groups]; n_images: how many calibration images to score on, always the same ones for
    the same number. Returns float64 [n_candidates], finite, lower is better: the L2 distance between the soft labels of
    the candidate and of the 8-bit model. Must be a function of its arguments alone, or searches are not reproducible.
    """

    def __call__(self, masks: BoolArray, n_images: int) -> FloatArray: ...


# What the processes before this one spent (empty in the first) -> what has been spent in all, finite numbers by name.
Costs = Callable[[Mapping[str, float]], dict[str, float]]


@dataclass(frozen=True)
class LatencyGoal:
    """What a plan has to gain in time. (What selectors do with it: `bitdial.selection.latency`.)

    layer_seconds  shares float64 [n, n_layers] of each layer's MACs that run low -> predicted seconds float64
                   [n, n_layers] per sample. A function of its argument alone; each column depends on its own layer only
    gain           0..1: at ratio r at least gain * r of the seconds that ratio 1 saves
    fingerprint    names what layer_seconds computes, so that a search checkpoint of another table is refused
    """

    layer_seconds: Callable[[FloatArray], FloatArray]
    gain: float
    fingerprint: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.gain <= 1.0:
            raise SelectionError(f"a latency gain of {self.gain} is not a share: give a number in 0..1")


@dataclass(frozen=True)
class SearchProgress:
    """Where a search stands; handed to the `progress` callable after every generation (baselines: every target).

    generation runs from 0 (the initial population) to `generations`. best: lowest fitness so far in this generation's
    population, on n_images images (nan if nothing was evaluated). evaluations: candidates scored so far, all targets
    together. seconds: wall clock so far, including the interrupted runs that this one resumes.
    """

    selector: str
    target: float
    target_index: int
    n_targets: int
    generation: int
    generations: int
    best: float
    n_images: int
    evaluations: int
    seconds: float


@dataclass(eq=False)
class SelectionResult:
    """Which groups run low at each target.

    selector, seed     what chose them
    targets            shares asked for, ascending
    masks              bool [n_targets, n_groups]
    shares             float64 [n_targets]: share of low MACs reached
    fitness            float64 [n_targets]: on all n_images; nan where nothing was evaluated
    greedy_fitness     float64 [n_targets]: of the greedy completion of the same nested set; nan where not evaluated
    history            one dict per target and generation: target, generation, best, mean, n_images, evaluations so far
    evaluations        candidates scored
    image_evaluations  sum over scored candidates of the images they were scored on
    cache_hits         candidates proposed again whose fitness was remembered
    seconds            wall clock
    nested             each set contains the former
    latency            float64 [n_targets]: predicted seconds per sample of the problem's layers; None without a goal
    former             the caller's costs of the interrupted processes before this one (see Costs)
    """

    selector: str
    seed: int
    targets: tuple[float, ...]
    masks: BoolArray
    shares: FloatArray
    fitness: FloatArray
    greedy_fitness: FloatArray
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    image_evaluations: int = 0
    cache_hits: int = 0
    seconds: float = 0.0
    nested: bool = True
    latency: FloatArray | None = None
    former: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """JSON-able statistics without masks and history (None where nothing was evaluated)."""
        latency = {} if self.latency is None else {"latency": self.latency.tolist()}
        return {
            "selector": self.selector,
            "seed": self.seed,
            "nested": self.nested,
            "targets": list(self.targets),
            "shares": self.shares.tolist(),
            "fitness": [_none_if_nan(f) for f in self.fitness],
            "greedy_fitness": [_none_if_nan(f) for f in self.greedy_fitness],
            "evaluations": self.evaluations,
            "image_evaluations": self.image_evaluations,
            "cache_hits": self.cache_hits,
            "seconds": self.seconds,
            **latency,
        }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


@dataclass(frozen=True, eq=False)
class Request:
    """What a selector is asked for.

    targets     shares, strictly ascending, in 0..1; at 0 nothing is low, at 1 everything
    evaluate    scores candidates; selectors that need none only report the fitness of what they chose
    nested      each target's set contains the former's; otherwise every target is solved on its own
    n_images    calibration images a full evaluation uses; at least 1 where `evaluate` is given
    progress    called now and then, see SearchProgress
    checkpoint  file from which an interrupted search resumes and to which it is saved; selectors that take no time
                ignore it
    latency     what every target has to gain in predicted time, where that is possible; "random" only reports it
    costs       what the caller counts (see Costs), so that the counts of an interrupted search are in its checkpoint

    Raises RatioError for a target outside 0..1, SelectionError for targets that are none or not strictly ascending, a
    negative seed, or n_images below 1 where `evaluate` is given.
    """

    problem: SelectionProblem
    targets: tuple[float, ...]
    evaluate: Evaluate | None = None
    seed: int = 0
    nested: bool = True
    n_images: int = 0
    progress: Callable[[SearchProgress], None] | None = None
    checkpoint: Path | None = None
    latency: LatencyGoal | None = None
    costs: Costs | None = None

    def __post_init__(self) -> None:
        targets, seed = tuple(float(t) for t in self.targets), self.seed
        if not targets:
            raise SelectionError("no targets were given: ask for at least one share in 0..1")
        for target in targets:
            if not 0.0 <= target <= 1.0:  # also catches nan
                raise RatioError(f"target {target} is not a share: give numbers in 0..1")
        if any(a >= b for a, b in itertools.pairwise(targets)):
            raise SelectionError(f"targets must be strictly ascending, got {list(targets)}: sort them and drop duplicates")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise SelectionError(f"seed {seed!r} is not a non-negative integer: choose one, for example 0")
        if self.evaluate is not None and self.n_images < 1:
            raise SelectionError(f"n_images is {self.n_images}: score candidates on at least 1 calibration image")
        for name, value in {"targets": targets, "seed": int(seed), "n_images": int(self.n_images)}.items():
            object.__setattr__(self, name, value)


class Selector(ABC):
    """One way of choosing the low groups. Implementations are deterministic for a seed."""

    name: str

    @abstractmethod
    def choose(self, request: Request) -> SelectionResult:
        """The low groups for every target share. Raises SelectionError for what is impossible."""

    def select(
        self, problem: SelectionProblem, targets: Sequence[float], evaluate: Evaluate | None = None, **more: Any
    ) -> SelectionResult:
        """`choose`, from the fields of a `Request`; raises what that does."""
        return self.choose(Request(problem, tuple(targets), evaluate, **more))
