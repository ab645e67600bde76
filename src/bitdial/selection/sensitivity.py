"""Making the scores of different layers comparable by measuring each layer once. NumPy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.errors import SelectionError
from bitdial.selection.problem import Evaluate, FloatArray, SelectionProblem
from bitdial.selection.scoring import Scorer


def layer_sensitivity(problem: SelectionProblem, evaluate: Evaluate, n_images: int) -> FloatArray:
    """float64 [n_layers]: measured fitness with each layer extracted whole, alone. One candidate per layer, one call.

    Raises SelectionError if n_images is below 1 or the evaluation returns anything but one finite number per candidate.
    """
    if n_images < 1:
        raise SelectionError(f"n_images is {n_images}: measure the layers on at least 1 calibration image")
    masks = problem.layer_index[None, :] == np.arange(problem.n_layers)[:, None]
    return Scorer(evaluate).score(masks, n_images)


def rescale_scores(problem: SelectionProblem, distances: npt.ArrayLike) -> SelectionProblem:
    """The problem with each layer's scores multiplied so that they add up to the layer's squared measured distance.

    distances: [n_layers], >= 0, as `layer_sensitivity` returns them. The order of groups within a layer is kept; a
    layer whose scores are all zero gets its squared distance spread evenly over its MACs.

    Measured is only what a whole layer does alone. That errors of groups and of layers are uncorrelated, so that their
    squares add (hence squared), is an assumption; a search that scores whole candidates does not need it.
    Raises SelectionError for distances of another length, negative or not finite.
    """
    measured = np.asarray(distances, dtype=np.float64)
    if measured.shape != (problem.n_layers,) or not np.isfinite(measured).all() or (measured < 0).any():
        raise SelectionError(
            f"distances must be {problem.n_layers} finite numbers >= 0, one per layer: take those of layer_sensitivity"
        )
    scores = []
    for old, macs, distance in zip(problem.scores, problem.macs, measured, strict=True):
        # Divided by the largest first, so that sums of tiny or huge scores neither vanish nor overflow.
        weights = old / old.max() if old.max() > 0 else macs.astype(np.float64)
        scores.append(weights / weights.sum() * distance**2)
    return SelectionProblem(problem.layer_names, tuple(scores), problem.macs)
