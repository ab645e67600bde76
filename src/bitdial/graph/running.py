"""One loop over steps in topological order that frees every value after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar


class Step(Protocol):
    """A node of a graph or an instruction of a program. `name` is also that of its result."""

    @property
    def name(self) -> str: ...
    def operands(self) -> Sequence[str]: ...


S = TypeVar("S", bound=Step)
T = TypeVar("T")


class Schedule(Generic[S]):
    """Steps and when values may be forgotten. kept: values that never are (constants and outputs)."""

    def __init__(self, steps: Sequence[S], kept: Collection[str]) -> None:
        self.steps = list(steps)
        last = {v: i for i, step in enumerate(self.steps) for v in step.operands()}
        self._dead: list[list[str]] = [[] for _ in self.steps]
        for value, index in last.items():
            if value not in kept:
                self._dead[index].append(value)

    def walk(self, values: dict[str, T], indices: Iterable[int] | None = None) -> Iterator[S]:
        """The steps in order, all or those of `indices`; after each, what no later one reads is dropped from `values`."""
        for index in range(len(self.steps)) if indices is None else indices:
            yield self.steps[index]
            for value in self._dead[index]:
                values.pop(value, None)

    def run(
        self,
        values: dict[str, T],
        evaluate: Callable[[S, dict[str, T]], T],
        observe: Callable[[str, T], None] | None = None,
        indices: Iterable[int] | None = None,
    ) -> dict[str, T]:
        """Fill `values` step by step and return it: what is left are the outputs and what was given but never read.

        observe: called with every step's name and result.
        """
        for step in self.walk(values, indices):
            result = values[step.name] = evaluate(step, values)
            if observe is not None:
                observe(step.name, result)
        return values
