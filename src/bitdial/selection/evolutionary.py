"""The evolutionary selector: a search over masks, scored whole, seeded with the greedy one. NumPy only.

Source: design notes, section 2. Generation 0 is the initial population; each of the `generations` that follow keeps the
best `survivors` candidates, fills up with their children and scores only those. Early generations are scored on fewer
images (`image_schedule`), survivors again when the number changes. The best few of the last generation and the greedy
completion are scored on all images and the best of them is the answer, so that it is never worse than greedy there.
With a latency goal all candidates meet it (see `bitdial.selection.latency`), the greedy one included.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from bitdial.errors import ConfigError, OutputError, SelectionError
from bitdial.selection.baselines import target_seed
from bitdial.selection.checkpoint import Generation, SearchState, load_checkpoint, save_checkpoint
from bitdial.selection.latency import (
    LatencyModel,
    concentrated_repair,
    latency_completion,
    latency_population,
    move_layers,
)
from bitdial.selection.problem import BoolArray, FloatArray, Request, SearchProgress, SelectionResult, Selector
from bitdial.selection.scoring import Scorer
from bitdial.selection.targets import density_ranks
from bitdial.selection.variation import SearchSpace, crossover, initial_population, swap_within_layers
from bitdial.settings import BaseConfig

if TYPE_CHECKING:
    from typing_extensions import Self

PROPOSALS_PER_CHILD = 5  # a child that was scored before is made again this often, before its place stays empty
MISSES_PER_CHILD = 40  # and so often, where it missed the latency goal: that costs no evaluation
LAYER_MOVES, CONCENTRATED = 0.3, 0.5  # shares of children, with a latency goal; believed, not tuned


class EvolutionarySettings(BaseConfig):
    """Settings of the evolutionary selector.

    Population and generations are the design's. The other defaults were tuned on synthetic problems with correlated
    errors, where most alternatives differed by a few percent of the fitness; they were not tuned on networks.
    """

    population: int = Field(default=50, ge=2, strict=True, description="Candidates per generation.")
    generations: int = Field(default=50, ge=0, strict=True, description="Rounds of children after the initial population.")
    survivors: int = Field(
        default=20, ge=1, strict=True,
        description="Candidates kept from one generation to the next, fewer than population; each round scores at most "
        "population - survivors new ones.",
    )  # fmt: skip
    tournament: int = Field(
        default=2, ge=1, strict=True,
        description="Survivors drawn per parent, the best of which becomes it; 1 means no selection pressure here.",
    )  # fmt: skip
    crossover_rate: float = Field(
        default=0.8, ge=0, le=1, description="Share of children with two parents; the others are mutated copies."
    )
    swaps: float = Field(
        default=1.0, ge=0, allow_inf_nan=False,
        description="Mean number of swaps per child (Poisson; at least one where there was no crossover).",
    )  # fmt: skip
    repair_noise: float = Field(
        default=0.2, ge=0, allow_inf_nan=False,
        description="Noise on score ranks (0..1) when a child is brought back to the target.",
    )  # fmt: skip
    initial_noise: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(0.1, 0.3, 0.8), min_length=1,
        description="Noise on score ranks of the perturbed greedy completions in the initial population.",
    )  # fmt: skip
    random_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of uniformly random candidates in the initial population."
    )
    image_schedule: tuple[tuple[float, float], ...] = Field(
        default=((0.4, 0.25), (0.4, 0.5), (0.2, 1.0)),
        description="Pairs (share of the generations, share of the images), in order; the former add up to 1, the latter rise "
        "within 0..1. The final choice is always made on all images.",
    )
    final_candidates: int = Field(
        default=5, ge=1, strict=True, description="How many of the last generation compete with greedy in the final choice."
    )
    context: str = Field(
        default="",
        description="Anything else the fitness depends on (a hash of model and settings, say); a checkpoint of another context "
        "is refused.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.survivors >= self.population:
            raise ConfigError(
                f"survivors ({self.survivors}) must be below population ({self.population}), or no children are made"
            )
        shares = [share for share, _ in self.image_schedule]
        images = [share for _, share in self.image_schedule]
        if not shares or not all(s > 0 for s in shares) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ConfigError(f"image_schedule: the shares of generations {shares} must be above 0 and add up to 1")
        if not all(0.0 < i <= 1.0 for i in images) or images != sorted(images):
            raise ConfigError(f"image_schedule: the shares of images {images} must rise within 0 (excluded) .. 1")
        return self

    def images(self, generation: int, n_images: int) -> int:
        """How many of n_images images a generation (0 .. generations) is scored on; at least 1."""
        done = generation / (self.generations + 1)
        end = 0.0
        for generations_share, images_share in self.image_schedule:
            end += generations_share
            if done < end - 1e-9:
                return max(1, math.ceil(images_share * n_images - 1e-9))
        return n_images


class EvolutionarySelector(Selector):
    """Searches masks for the lowest fitness at each target, in order, each target containing the former (if nested)."""

    name = "evolutionary"

    def __init__(self, settings: EvolutionarySettings | None = None) -> None:
        self.settings = settings if settings is not None else EvolutionarySettings()

    def choose(self, request: Request) -> SelectionResult:
        """`evaluate` is required.

        With `checkpoint`, the state is saved after every generation and every target, and a search that finds its own
        state there goes on from it; the file of a finished search is left in place and answers a repeated call at once.
        Raises SelectionError also for a checkpoint of another search, OutputError where it cannot be written.
        """
        if request.evaluate is None:
            raise SelectionError(
                "the evolutionary selector needs an evaluation of candidates: pass `evaluate`, or use selector 'greedy'"
            )
        if request.checkpoint is not None and not Path(request.checkpoint).parent.is_dir():
            raise OutputError(
                f"cannot write the search checkpoint {request.checkpoint}: its directory does not exist; make it"
            )
        return _Search(self.settings, request).run()


class _Search:
    """One call of `EvolutionarySelector.select`."""

    def __init__(self, settings: EvolutionarySettings, request: Request) -> None:
        problem, latency = request.problem, request.latency
        self.settings = settings
        self.problem = problem
        self.targets = request.targets
        self.seed = request.seed
        self.nested = request.nested
        self.n_images = request.n_images
        self.progress = request.progress
        self.checkpoint = None if request.checkpoint is None else Path(request.checkpoint)
        self.scorer = Scorer(request.evaluate)
        self.ranks = density_ranks(problem)
        self.identity: dict[str, Any] = {
            "problem": problem.digest,
            "targets": list(self.targets),
            "nested": self.nested,
            "seed": self.seed,
            "n_images": self.n_images,
            "settings": settings.model_dump(),
        }
        self.latency = LatencyModel(problem, latency) if latency is not None else None
        if latency is not None:
            self.identity["latency"] = {"gain": latency.gain, "fingerprint": latency.fingerprint}
        self.wanted = -math.inf  # seconds that a candidate of the present target has to gain
        self.greedy = np.zeros(problem.n_groups, dtype=np.bool_)  # greedy completion of the present target
        self.started = time.perf_counter()
        self.state = SearchState()
        if self.checkpoint is not None:
            self.state = load_checkpoint(self.checkpoint, self.identity, problem.n_groups) or self.state
        self.seconds_before = self.state.seconds
        self.costs, self.former = request.costs, self.state.costs
        self.scorer.evaluations = self.state.evaluations
        self.scorer.image_evaluations = self.state.image_evaluations
        self.scorer.cache_hits = self.state.cache_hits
        if self.state.current is not None:
            self.scorer.n_images = self.state.current.n_images
            self.scorer.memory = self.state.memory

    def run(self) -> SelectionResult:
        state, problem = self.state, self.problem
        for index in range(len(state.masks), len(self.targets)):
            fixed = np.zeros(problem.n_groups, dtype=np.bool_)
            if self.nested and state.masks:
                fixed = state.masks[-1]
            space = SearchSpace(problem, self.targets[index], fixed, self.ranks)
            mask, fitness, greedy_fitness = self._solve(space, index)
            state.masks.append(mask)
            state.fitness.append(fitness)
            state.greedy_fitness.append(greedy_fitness)
            state.current = None
            self.scorer.forget()  # so that a resumed search, which starts the next target without memory, is the same
            self._save()
            if self.targets[index] in (0.0, 1.0):
                self._report(index)
        return SelectionResult(
            selector=EvolutionarySelector.name,
            seed=self.seed,
            targets=self.targets,
            masks=np.stack(state.masks),
            shares=np.array([problem.share(mask) for mask in state.masks]),
            fitness=np.array(state.fitness),
            greedy_fitness=np.array(state.greedy_fitness),
            history=state.history,
            **self.scorer.counts(),
            seconds=self._seconds(),
            nested=self.nested,
            latency=self.latency.seconds(np.stack(state.masks)) if self.latency is not None else None,
            former=self.former,
        )

    def _solve(self, space: SearchSpace, index: int) -> tuple[BoolArray, float, float]:
        """The mask of one target, its fitness and that of the greedy completion, both on all images."""
        settings = self.settings
        if space.target in (0.0, 1.0):  # nothing to choose: none or all
            fitness = float(self.scorer.score(space.greedy[None], self.n_images)[0])
            self._record(index, 0, np.array([fitness]), self.n_images)
            return space.greedy, fitness, fitness
        self.greedy = space.greedy
        if self.latency is not None:
            self.greedy = latency_completion(space, self.latency)
            self.wanted = min(self.latency.wanted(space.target), float(self.latency.gains(self.greedy[None])[0]))
        generation = self.state.current
        if generation is None:
            generation = self._first_generation(space)
            self._finish_generation(index, generation)
        while generation.index < settings.generations:
            generation = self._next_generation(space, generation)
            self._finish_generation(index, generation)
        best = np.argsort(generation.fitness, kind="stable")[: settings.final_candidates]
        # Greedy comes first and argmin takes the first of equals, so that a search that found nothing better changes
        # nothing.
        finalists = np.concatenate([self.greedy[None], generation.population[best]])
        fitness_of = self.scorer.score(finalists, self.n_images)
        winner = int(np.argmin(fitness_of))
        return finalists[winner], float(fitness_of[winner]), float(fitness_of[0])

    def _first_generation(self, space: SearchSpace) -> Generation:
        settings = self.settings
        rng = np.random.Generator(np.random.PCG64(target_seed(self.seed, space.target)))
        noises, random_share = settings.initial_noise, settings.random_share
        if self.latency is None:
            population = initial_population(space, settings.population, noises, random_share, rng)
        else:
            population = latency_population(
                space, self.latency, self.greedy, self.wanted, settings.population, noises, random_share, rng
            )
        n_images = settings.images(0, self.n_images)
        return Generation(0, population, self.scorer.score(population, n_images), n_images, rng)

    def _next_generation(self, space: SearchSpace, last: Generation) -> Generation:
        settings = self.settings
        n_images = settings.images(last.index + 1, self.n_images)
        kept = np.argsort(last.fitness, kind="stable")[: settings.survivors]
        survivors, fitness = last.population[kept], last.fitness[kept]
        if n_images != last.n_images:
            fitness = self.scorer.score(survivors, n_images)
        children = self._children(space, survivors, fitness, n_images, last.rng)
        if children:
            made = np.stack(children)
            fitness = np.concatenate([fitness, self.scorer.score(made, n_images)])
            survivors = np.concatenate([survivors, made])
        return Generation(last.index + 1, survivors, fitness, n_images, last.rng)

    def _children(
        self, space: SearchSpace, parents: BoolArray, fitness: FloatArray, n_images: int, rng: np.random.Generator
    ) -> list[BoolArray]:
        """Up to population - survivors children, none scored before on n_images and no two equal."""
        settings = self.settings
        known: set[bytes] = set()
        children: list[BoolArray] = []
        for _ in range(settings.population - settings.survivors):
            for _ in range(PROPOSALS_PER_CHILD):
                child = self._child(space, parents, fitness, rng)
                if self.latency is not None:
                    for _ in range(MISSES_PER_CHILD):
                        if self._meets_goal(child):
                            break
                        child = self._child(space, parents, fitness, rng)
                    else:
                        break
                if not self.scorer.seen(child, n_images) and child.tobytes() not in known:
                    known.add(child.tobytes())
                    children.append(child)
                    break
        return children

    def _child(
        self, space: SearchSpace, parents: BoolArray, fitness: FloatArray, rng: np.random.Generator
    ) -> BoolArray:
        settings = self.settings
        child = self._parent(parents, fitness, rng)
        n_swaps = int(rng.poisson(settings.swaps))
        if rng.random() < settings.crossover_rate:
            child = crossover(space, child, self._parent(parents, fitness, rng), rng)
        else:
            n_swaps = max(1, n_swaps)
        child = swap_within_layers(space, child, n_swaps, rng)
        if self.latency is not None:
            if rng.random() < LAYER_MOVES:
                child = move_layers(space, child, rng)
            if rng.random() < CONCENTRATED:
                return concentrated_repair(space, child, settings.repair_noise, rng)
        return space.repair(child, settings.repair_noise, rng)

    def _meets_goal(self, mask: BoolArray) -> bool:
        return self.latency is None or float(self.latency.gains(mask[None])[0]) >= self.wanted

    def _parent(self, parents: BoolArray, fitness: FloatArray, rng: np.random.Generator) -> BoolArray:
        drawn = rng.integers(len(parents), size=self.settings.tournament)
        winner: BoolArray = parents[drawn[np.argmin(fitness[drawn])]]
        return winner

    def _record(self, index: int, generation: int, fitness: FloatArray, n_images: int) -> None:
        """Note a scored generation of target `index` in the history."""
        self.state.history.append(self.scorer.row(self.targets[index], generation, fitness, n_images))

    def _finish_generation(self, index: int, generation: Generation) -> None:
        """Note a scored generation, save it, report it."""
        self._record(index, generation.index, generation.fitness, generation.n_images)
        self.state.current = generation
        self._save()
        self._report(index)

    def _report(self, index: int) -> None:
        """Hand the last row of the history to `progress`."""
        if self.progress is None:
            return
        row = self.state.history[-1]
        self.progress(
            SearchProgress(
                selector=EvolutionarySelector.name,
                target=self.targets[index],
                target_index=index,
                n_targets=len(self.targets),
                generation=row["generation"],
                generations=self.settings.generations,
                best=row["best"],
                n_images=row["n_images"],
                evaluations=row["evaluations"],
                seconds=self._seconds(),
            )
        )

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self) -> None:
        state = self.state
        state.memory = self.scorer.memory
        state.evaluations = self.scorer.evaluations
        state.image_evaluations = self.scorer.image_evaluations
        state.cache_hits = self.scorer.cache_hits
        state.seconds = self._seconds()
        state.costs = self.costs(self.former) if self.costs is not None else self.former
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.identity, state)
