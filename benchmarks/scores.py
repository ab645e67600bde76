"""How good a network's outputs are, and how sure that is: top-1 accuracy of classes, rank correlation of sentence pairs.

Every difference to float is paired: both networks saw the same samples, so what these share in difficulty cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from measure import pack_flags, paired_difference

Outputs = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

RESAMPLES = 1000  # of the bootstrap


class Score(Protocol):
    """A measure with its truth.

    name     as in tables
    samples  how many images, pairs, ...
    figures  {"accuracy", "standard_error", "to_float", "to_float_standard_error", "agreement"} of outputs, and what the next
             reader needs to pair them again
    """

    name: str

    @property
    def samples(self) -> int: ...
    def figures(self, outputs: Outputs, reference: Outputs) -> dict[str, Any]: ...


@dataclass
class TopOne:
    """Share of images whose largest output is the right class; agreement: share with the same answer as float."""

    labels: npt.NDArray[np.int64]
    name: str = "top-1"

    @property
    def samples(self) -> int:
        return len(self.labels)

    def figures(self, outputs: Outputs, reference: Outputs) -> dict[str, Any]:
        """outputs, reference (of the float network): [images, classes]."""
        answers, expected = outputs.argmax(-1), reference.argmax(-1)
        correct = answers == self.labels
        difference, error = paired_difference(correct, expected == self.labels)
        share = float(correct.mean())
        return {
            "accuracy": share,
            "standard_error": float(np.sqrt(share * (1.0 - share) / len(correct))),
            "to_float": difference,
            "to_float_standard_error": error,
            "agreement": float((answers == expected).mean()),
            "correct": pack_flags(correct),
        }


@dataclass
class PairRanks:
    """Spearman correlation of the cosine similarity of sentence pairs with people's scores; agreement: with the similarities of
    the float network. Outputs hold the first sentences of all pairs, then the second ones."""

    truth: Values
    name: str = "Spearman"
    seed: int = 0

    @property
    def samples(self) -> int:
        return len(self.truth)

    def figures(self, outputs: Outputs, reference: Outputs) -> dict[str, Any]:
        """outputs, reference (of the float network): [2 * pairs, width]. Errors by bootstrap over pairs."""
        own, expected = similarities(outputs), similarities(reference)
        value = spearman(own, self.truth)
        spread, difference_spread = bootstrap(own, expected, self.truth, self.seed)
        return {
            "accuracy": value,
            "standard_error": spread,
            "to_float": value - spearman(expected, self.truth),
            "to_float_standard_error": difference_spread,
            "agreement": spearman(own, expected),
        }


def similarities(embeddings: Outputs) -> Values:
    """float64 [pairs]: cosine between row i and row i + pairs. 0 where an embedding is all zero."""
    wide = embeddings.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    half = len(wide) // 2
    result: Values = (wide[:half] * wide[half:]).sum(axis=1)
    return result


def ranks(values: Values) -> Values:
    """float64 [n]: ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    result: Values = (np.cumsum(counts) - (counts + 1) / 2)[place]
    return result


def spearman(a: Values, b: Values) -> float:
    """Rank correlation; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0.0 else 0.0


def bootstrap(own: Values, reference: Values, truth: Values, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Standard errors of spearman(own, truth), and of its difference to spearman(reference, truth) on the same pairs."""
    draws = np.random.default_rng(seed)
    values = np.empty((resamples, 2))
    for row in values:
        chosen = draws.integers(0, len(truth), len(truth))
        row[:] = spearman(own[chosen], truth[chosen]), spearman(reference[chosen], truth[chosen])
    return float(values[:, 0].std(ddof=1)), float((values[:, 0] - values[:, 1]).std(ddof=1))
