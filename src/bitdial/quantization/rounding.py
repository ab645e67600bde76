"""Reconstruction of rounding: 8-bit weights chosen so that what they become at low precision errs less in outputs.

The low weight is a function of the 8-bit one (rne(w8 / 2^shift)), so rounding it the other way costs nothing to store: the
8-bit weight only has to move across the border between two cells. Which way to round is found as in GPTQ (Frantar et al.
2022): weights one after another, the error of each spread over those still open, with the covariance of the inputs. Two
changes are ours: errors are spread inside a group only, since at a partial ratio the other groups may not be low, and no
weight may move by more than `slack` of a low step, so that the 8-bit model stays what it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.quantization.effective_bits import lower
from bitdial.quantization.output_error import LayerSamples

DAMPING = 0.01  # of the mean variance, added to the covariance: samples are few


def reconstruct(samples: LayerSamples, slack: float) -> npt.NDArray[np.int8]:
    """New int8 weights of a layer, same shape, for its present shifts.

    slack: how far a weight may move for another rounding, in low steps (2^shift); 0 changes nothing.
    """
    layer = samples.layer
    assert layer.weight is not None
    n_local = layer.weight_shift.shape[1]
    result = layer.weight.copy()
    for g in range(layer.n_groups):
        rows = samples.rows(g)
        x = samples.prepare(samples.low_inputs(g, int(layer.activation_shift[g]))).astype(np.float64)
        w8 = samples.weights(g)
        moved = _round_group(w8, layer.weight_shift[rows, g % n_local], x, layer.wmax, slack)
        offset = (g // n_local) * layer.weight.shape[1]
        a, b = layer.group_bounds[g : g + 2] - offset
        result[rows, a:b] = moved.reshape(result[rows, a:b].shape)
    return result


def _round_group(
    w8: npt.NDArray[np.int16], shift: npt.NDArray[np.uint8], x: npt.NDArray[np.float64], limit: int, slack: float
) -> npt.NDArray[np.int8]:
    """w8: [O, m]; shift: [O]; x: [n, m] samples of the lowered inputs. Returns int8 [O, m]."""
    covariance = x.T @ x / len(x)
    covariance += np.eye(len(covariance)) * (DAMPING * float(np.trace(covariance)) / len(covariance) + 1e-6)
    order = np.argsort(-np.diag(covariance), kind="stable")  # what matters most is rounded while most is still open
    inverse = np.linalg.inv(covariance[np.ix_(order, order)])
    factor = np.linalg.cholesky(inverse).T  # upper
    original = w8[:, order].astype(np.int64)
    target = original.astype(np.float64)
    chosen = np.empty_like(original)
    step = 1 << shift.astype(np.int64)
    nearest = lower(original, shift[:, None], limit).astype(np.int64)
    for j in range(original.shape[1]):
        wanted = np.clip(np.rint(target[:, j] / step), -limit, limit).astype(np.int64)
        wanted = np.clip(wanted, nearest[:, j] - 1, nearest[:, j] + 1)
        value = _nearest_in_cell(original[:, j], wanted, step, limit)
        refused = np.abs(value - original[:, j]) > slack * step
        chosen[:, j] = np.where(refused, original[:, j], value)
        low = np.where(refused, nearest[:, j], wanted)
        error = (target[:, j] - low * step) / factor[j, j]
        target[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :][None]
    plain = _output_error(original, nearest * step[:, None], covariance[np.ix_(order, order)])
    found = lower(chosen, shift[:, None], limit).astype(np.int64) * step[:, None]
    worse = _output_error(original, found, covariance[np.ix_(order, order)]) >= plain
    chosen[worse] = original[worse]  # with many saturated weights or little slack, spreading errors can lose
    result = np.empty_like(chosen)
    result[:, order] = chosen
    return result.astype(np.int8)


def _output_error(
    exact: npt.NDArray[np.int64], low: npt.NDArray[np.int64], covariance: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """float64 [O]: expected squared output error of every row."""
    error = (exact - low).astype(np.float64)
    result: npt.NDArray[np.float64] = np.einsum("oi,oi->o", error @ covariance, error)
    return result


def _nearest_in_cell(
    value: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], step: npt.NDArray[np.int64], limit: int
) -> npt.NDArray[np.int64]:
    """The 8-bit weight nearest to `value` that lowers to `wanted` (ties of rne belong to the even neighbour)."""
    odd = np.abs(wanted) % 2
    half = step // 2
    inner = np.where(step > 1, odd, 0)
    low = np.where(wanted <= -limit, -127, wanted * step - half + inner)
    high = np.where(wanted >= limit, 127, wanted * step + half - inner)
    return np.clip(value, np.maximum(low, -127), np.minimum(high, 127))
