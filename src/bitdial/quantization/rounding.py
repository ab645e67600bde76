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

from bitdial.quantization.effective_bits import extract
from bitdial.quantization.output_error import LayerSamples

DAMPING = 0.01  # of the mean variance, added to the covariance: samples are few
BATCH_BYTES = 1 << 20  # of the float64 weights that are rounded together: they stay in a core's cache


def reconstruct(samples: LayerSamples, slack: float) -> npt.NDArray[np.int8]:
    """New int8 weights of a layer, same shape, for its present shifts.

    slack: how far a weight may move for another rounding, in low steps (2^shift); 0 changes nothing.
    """
    layer = samples.layer
    assert layer.weight is not None
    n_local = layer.weight_shift.shape[1]
    result = layer.weight.copy()
    for groups in _batches(samples):
        w8 = np.stack([samples.weights(g) for g in groups])
        shift = np.stack([layer.weight_shift[samples.rows(g), g % n_local] for g in groups])
        moved = _round_groups(w8, shift, np.stack([_covariance(samples, g) for g in groups]), layer.wmax, slack)
        for g, own in zip(groups, moved, strict=True):
            rows, offset = samples.rows(g), (g // n_local) * layer.weight.shape[1]
            a, b = layer.group_bounds[g : g + 2] - offset
            result[rows, a:b] = own.reshape(result[rows, a:b].shape)
    return result


def _batches(samples: LayerSamples) -> list[list[int]]:
    """The groups of a layer cut into runs of one width, whose targets take at most BATCH_BYTES."""
    layer = samples.layer
    assert layer.weight is not None
    widths = np.diff(layer.group_bounds) * layer.weight[0, 0].size
    rows = layer.weight.shape[0] // layer.conv_groups
    result: list[list[int]] = []
    for g, width in enumerate(widths.tolist()):
        last = result[-1] if result else []
        if last and widths[last[0]] == width and (len(last) + 1) * rows * width * 8 <= BATCH_BYTES:
            last.append(g)
        else:
            result.append([g])
    return result


def _covariance(samples: LayerSamples, index: int) -> npt.NDArray[np.float64]:
    """float64 [m, m]: of the lowered inputs of one group, damped."""
    shift = int(samples.layer.activation_shift[index])
    x = samples.low_inputs(samples.inputs(index), [shift])[0].numpy()
    x = (x - x.mean(axis=0) if samples.centred else x).astype(np.float64)
    covariance: npt.NDArray[np.float64] = x.T @ x / len(x)
    covariance += np.eye(len(covariance)) * (DAMPING * float(np.trace(covariance)) / len(covariance) + 1e-6)
    return covariance


def _round_groups(
    w8: npt.NDArray[np.int16], shift: npt.NDArray[np.uint8], covariance: npt.NDArray[np.float64], limit: int, slack: float
) -> npt.NDArray[np.int8]:
    """w8: [groups, O, m]; shift: [groups, O]; covariance: [groups, m, m] of the lowered inputs. Returns int8 [groups, O, m].

    No group knows of another: they are taken together so that each of the m steps is one operation over all.
    """
    order = np.argsort(-np.diagonal(covariance, axis1=1, axis2=2), axis=1, kind="stable")  # what matters most is rounded
    covariance = np.take_along_axis(covariance, order[:, :, None], axis=1)  # while most is still open
    covariance = np.take_along_axis(covariance, order[:, None, :], axis=2)
    factor = np.linalg.cholesky(np.linalg.inv(covariance)).transpose(0, 2, 1)  # upper
    factor = np.ascontiguousarray(factor.transpose(1, 2, 0))[..., None]  # [m, m, groups, 1]
    columns = order.T[:, :, None]
    original = np.take_along_axis(w8.transpose(2, 0, 1).astype(np.int64), columns, axis=0)  # [m, groups, O]
    target = original.astype(np.float64)
    chosen = np.empty_like(original)
    step = 1 << shift.astype(np.int64)
    nearest = extract(original, shift, limit).astype(np.int64)
    for j in range(len(original)):
        wanted = np.clip(np.rint(target[j] / step), -limit, limit).astype(np.int64)
        wanted = np.clip(wanted, nearest[j] - 1, nearest[j] + 1)
        value = _nearest_in_cell(original[j], wanted, step, limit)
        refused = np.abs(value - original[j]) > slack * step
        chosen[j] = np.where(refused, original[j], value)
        low = np.where(refused, nearest[j], wanted)
        error = (target[j] - low * step) / factor[j, j]
        target[j + 1 :] -= error * factor[j, j + 1 :]
    plain = _output_error(original - nearest * step, covariance)
    found = _output_error(original - extract(chosen, shift, limit).astype(np.int64) * step, covariance)
    # with many saturated weights or little slack, spreading errors can lose
    chosen = np.where(found >= plain, original, chosen)
    result = np.empty(chosen.shape, np.int8)
    np.put_along_axis(result, columns, chosen.astype(np.int8), axis=0)
    return result.transpose(1, 2, 0)


def _output_error(error: npt.NDArray[np.int64], covariance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64 [groups, O]: expected squared output error of errors [m, groups, O] of weights."""
    rows = np.ascontiguousarray(error.transpose(1, 2, 0)).astype(np.float64)
    result: npt.NDArray[np.float64] = np.einsum("goi,goi->go", rows @ covariance, rows)
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
