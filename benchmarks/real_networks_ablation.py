"""What each step of quantization is worth: rows of `real_networks.py --ablation`, one step left out at a time.

Steps that the package has a setting for are left out by it. The others are switched off here, by putting another function or
constant in the place of a named one for as long as a network is prepared (`HOOKS`): a user has no use for a worse result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from real_networks_rows import Configuration

ABLATION = (
    Configuration("all", "nothing (everything, 4 bits)"),  # what `Options.config` starts from
    Configuration("without-plane", "low weights of their own (derived from the 8-bit ones)", {"low_weights": "derived"}),
    Configuration("without-ridge", "ridge regression of the low weights", hook="ridge"),
    Configuration("without-gptq", "GPTQ (rounded to the nearest)", hook="gptq"),
    Configuration("without-means", "means restored, at any ratio", {"bias_correction": False}),
    Configuration("without-scales", "scales moved behind LayerNorms", {"smooth": 0.0}, transformer=True),
    Configuration("without-order", "nesting order (all groups solved at 100 %)", hook="order"),
    Configuration("without-search", "evolutionary search (greedy)", {"selector": "greedy"}),
    Configuration("without-shifts", "shifts of least output error (from the largest magnitudes)", {"shift_choice": "plain"}),
    Configuration("without-nesting", "nested choices (each ratio chosen alone)", {"nested": False}),
    Configuration("with-widths", "4 bits (widths of this processor)", {"target": "cpu", "low_bits": "auto"}),
)
SHOWN = (0.0, 0.5, 1.0)
HEAD = ("8-bit", *(f"{100 * ratio:.0f} %" for ratio in SHOWN[1:]))

Hook = Callable[[], Any]  # a context manager


def _no_ridge() -> Any:
    """No strength to choose from: the weights that are rounded are the 8-bit ones."""
    return mock.patch("bitdial.quantization.low_plane.RIDGES", ())


def round_to_nearest(target: Tensor, covariance: Tensor, inverse: Tensor, step: Tensor, limit: int) -> Tensor:
    """As `low_plane.round_in_order`, but no error is passed on."""
    return (target / step).round_().clamp_(-limit, limit)


def _no_gptq() -> Any:
    return mock.patch("bitdial.quantization.low_plane.round_in_order", round_to_nearest)


def _no_order() -> Any:
    """The highest ratio first: it solves all groups together, for errors that are not there at lower ratios."""
    from bitdial.pipeline import quantizing

    ordinary = quantizing.restore_means

    def highest_first(prepared: Any, program: Any, config: Any, indices: Sequence[int], *rest: Any, **named: Any) -> None:
        ordinary(prepared, program, config, sorted(indices, reverse=True), *rest, **named)

    return mock.patch.object(quantizing, "restore_means", highest_first)


HOOKS: dict[str, Hook] = {"ridge": _no_ridge, "gptq": _no_gptq, "order": _no_order}


@contextmanager
def switched_off(hook: str) -> Iterator[None]:
    """Without a step of that name, "" for all steps. Raises KeyError."""
    if not hook:
        yield
        return
    with HOOKS[hook]():
        yield


def ablation_markdown(networks: Mapping[str, Mapping[str, Mapping[str, Any]]], caption: str = "") -> str:
    """A table for each network: steps left out as rows, ratios as columns; points to float with paired standard errors."""
    parts = []
    for network, rows in networks.items():
        parts += [
            "| " + " | ".join([f"{network}, without", *HEAD]) + " |",
            "|---|" + "---:|" * len(HEAD),
            *("| " + " | ".join(line) + " |" for line in ablation_rows(rows)),
            "",
        ]
    return "\n".join([*parts, "Points to float, with paired standard errors." + (f" {caption}" if caption else ""), ""])


def ablation_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Lines of one network, in the order of ABLATION."""
    lines = []
    for step in ABLATION:
        if step.name in rows:
            found = {entry["ratio"]: entry for entry in rows[step.name]["entries"]}
            lines.append([step.label, *(_cell(found.get(r)) for r in SHOWN)])
    return lines


def _cell(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else f"{100 * entry['to_float']:+.2f} ± {100 * entry['to_float_standard_error']:.2f}"
