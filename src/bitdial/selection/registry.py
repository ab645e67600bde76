"""Selectors by name. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from bitdial.errors import ConfigError
from bitdial.selection.baselines import GreedySelector, RandomSelector
from bitdial.selection.evolutionary import EvolutionarySelector, EvolutionarySettings
from bitdial.selection.problem import Evaluate, Request, SelectionProblem, SelectionResult, Selector

DEFAULT_SELECTOR = "evolutionary"


def _evolutionary(**settings: Any) -> Selector:
    return EvolutionarySelector(EvolutionarySettings(**settings))


# Name -> what makes the selector from its settings. A new selector is added here.
_FACTORIES: dict[str, Callable[..., Selector]] = {
    "random": RandomSelector,
    "greedy": GreedySelector,
    "evolutionary": _evolutionary,
}


def selector_names() -> tuple[str, ...]:
    """The names `get_selector` knows."""
    return tuple(_FACTORIES)


def get_selector(name: str, **settings: Any) -> Selector:
    """The selector of that name: "random", "greedy" (no settings) or "evolutionary" (see EvolutionarySettings).

    Raises ConfigError for an unknown name, an unknown setting or one out of its range.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError(f"there is no selector {name!r}: choose one of {', '.join(_FACTORIES)}")
    try:
        return factory(**settings)
    except TypeError as error:
        raise ConfigError(f"selector {name!r} does not take these settings ({', '.join(settings)}): {error}") from error


def select_groups(
    name: str, problem: SelectionProblem, targets: Sequence[float], evaluate: Evaluate | None = None, **given: Any
) -> SelectionResult:
    """`get_selector(name, **settings).select(...)` in one call; see both for arguments (given: those of either) and errors."""
    asked = {field.name for field in fields(Request)}
    selector = get_selector(name, **{key: value for key, value in given.items() if key not in asked})
    return selector.select(problem, targets, evaluate, **{key: given[key] for key in given if key in asked})
