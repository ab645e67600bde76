"""Low weights as integers of their own: solved for the errors that they meet, not derived from the 8-bit ones.

Where a layer's groups become low, their low weights are chosen to restore the sums of the 8-bit model from the inputs as they
then are, with two steps per layer. A ridge regression (towards the 8-bit weights) lets them absorb what extraction upstream,
the extraction of their own inputs and groups that were low before have done to the sums; GPTQ (Frantar et al. 2022: weights
rounded one after another, the error of each spread over those still open) rounds the result. The float network is no good
target: where 8 bits themselves err (outliers behind LayerNorm), a quarter of the weights would be bent to make up for that
(MiniLM lost 4 points at 25 % so, 0.2 this way). Errors only ever go to groups that become low now, so they are low whenever
the sources of these errors are, and one plane serves every ratio of a nested dial (design notes, section 1: GPTQ in nesting
order). 8-bit weights are never touched.

Everything is in units of the layer's accumulators: inputs are 8-bit integers, weights 8-bit steps, outputs accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.quantization.byte_products import int8_products, sample_sum, squared_sums
from bitdial.quantization.effective_bits import naive_shift
from bitdial.quantization.output_error import LayerSamples
from bitdial.quantization.program import BLOCK_ROWS, QuantizedLayer
from bitdial.quantization.weights import low_integers, per_weight, read_back_weights

# Rows that count (see `counting_rows`) which a layer needs per input, or its weights are only rounded: fewer are fitted to the
# samples at hand. MiniLM's layers of 1,536 inputs have 1.1, and rounding them takes 100 % at 4 bits from 77.1 to 91.9 (300 pairs,
# float 93.4); 25, 50 and 75 % stay at 93.6, 93.2 and 93.3. A small convolutional network with 1.8 errs 1.5 to 2 times less when
# it is fitted.
ROWS_PER_INPUT = 1.5
ROUNDED = 1e6  # damping that leaves errors where they are made
DAMPING = 0.1  # of the mean variance of the inputs: keeps GPTQ stable
RIDGES = (0.03, 0.1, 0.3, 1.0, 10.0)  # as much, towards the 8-bit weights; which one is chosen on rows held out
# Where fewer of the rows count than this share, only the strongest: the rows held out are mostly padding then, alike in all
# samples, and weak ridges that look good on them lose on words. MiniLM (0.29) at 100 %, on 3,000 sentences that were not seen:
# 7.0 dB, a rank correlation of 97.9 % with float's similarities, instead of 6.5 dB and 97.0 %.
PADDED = 0.5
HELD_OUT = 4  # one of so many rows, the last ones: they come from other samples
MOST_COLUMNS = 2048  # solved at once; more groups than that are taken in runs, each after the other
QUARTERS = 4  # of a layer, solved one after another before anything is chosen
BLOCK = 128  # columns after which rounding errors are passed on to all others at once


def solve_groups(
    layer: QuantizedLayer,
    groups: npt.NDArray[np.bool_],
    inputs: Tensor,
    errors: Tensor,
    *,
    centred: bool,
    counting: float = 1.0,
    left: bool = True,
) -> None:
    """Choose shifts and low weights of some groups of a layer, in place (`weight_shift`, `low_weight`).

    groups: bool [n_groups], those to solve. inputs: uint8, int8 or float32 [n, C * taps], rows of what the layer multiplies, low
    channels as they are read back. errors: float32 [n, O], wanted minus present outputs, the groups in question being at their
    8-bit weights; changed in place, to what is left where `left` says so. centred: the bias table restores means, so `errors`
    has none and inputs are taken less theirs. counting: the share of the rows that count.
    """
    assert layer.weight is not None and layer.low_weight is not None
    outputs, per_group = layer.weight.shape[:2]
    taps = layer.weight[0, 0].size
    n_local = layer.weight_shift.shape[1]
    rows = outputs // layer.conv_groups
    unit = torch.from_numpy(layer.weight_scale.astype(np.float64))
    high = layer.weight.reshape(outputs, -1)
    low = layer.low_weight.reshape(outputs, -1)
    for conv_group in range(layer.conv_groups):
        own = slice(conv_group * rows, (conv_group + 1) * rows)
        chosen = np.flatnonzero(groups[conv_group * n_local : (conv_group + 1) * n_local])
        runs = _runs(chosen, np.diff(layer.group_bounds[: n_local + 1]) * taps)
        for number, run in enumerate(runs, 1):
            columns = np.concatenate([np.arange(*layer.group_bounds[[j, j + 1]]) for j in run])  # of this convolution group
            columns = (columns[:, None] * taps + np.arange(taps)).reshape(-1)
            x = inputs[:, torch.from_numpy(columns + conv_group * per_group * taps)]
            wanted = errors[:, own]
            start = torch.from_numpy(high[own][:, columns].astype(np.float64))
            fitted = len(x) * counting >= ROWS_PER_INPUT * per_group * taps
            strengths = () if not fitted else RIDGES if counting >= PADDED else RIDGES[-1:]
            mean = sample_sum(x) / len(x) if centred else None
            change, covariance = ridge(x, wanted, unit[own], strengths, mean)
            target = start + change
            damping = DAMPING if fitted else ROUNDED
            covariance.diagonal().add_(damping * float(covariance.diagonal().mean()) + 1e-6)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
            widths = [int(w) * taps for w in np.diff(layer.group_bounds)[run]]
            shifts = _shifts(target, inverse.diagonal().reciprocal(), unit[own], widths, layer)
            step = torch.exp2(torch.repeat_interleave(shifts.double(), torch.tensor(widths), dim=1))
            integers = round_in_order(target, covariance, inverse, step, layer.wmax)
            layer.weight_shift[own, run] = shifts.numpy().astype(np.uint8)
            low[own, columns] = integers.numpy().astype(np.int8)
            if left or number < len(runs):
                moved = integers * step - start
                wanted -= x.float() @ moved.float().T
                if mean is not None:
                    wanted += (moved @ mean).float()
    layer.low_weight = low.reshape(layer.weight.shape)


def provisional_plane(samples: LayerSamples, scores: npt.NDArray[np.float64], counting: float = 1.0) -> None:
    """Low weights and shifts of a whole layer in place, before anything is chosen: what the selection judges groups by.

    Groups are solved in quarters by ascending score (float64 [n_groups]), the order in which ratios will likely make them
    low, with the inputs of the 8-bit model: whichever of the leading quarters are low, their weights know of no others. counting:
    the share of the rows that count.
    """
    layer = samples.layer
    if layer.low_weight is None:
        layer.low_weight = low_integers(layer)
    x = torch.from_numpy(samples.patches.reshape(len(samples.patches), -1)).float()
    taps = samples.patches.shape[2]
    shift = torch.from_numpy(layer.activation_shift[layer.channel_groups()].astype(np.float32)).repeat_interleave(taps)
    step = torch.exp2(shift)
    low = (x / step).round_().clamp_(-layer.amax if samples.signed else 0, layer.amax).mul_(step)
    weight = present_weights(layer, np.zeros(layer.n_groups, np.bool_))
    groups = torch.from_numpy(layer.channel_groups()).repeat_interleave(taps)
    n_local = layer.weight_shift.shape[1]
    rank = np.argsort(np.argsort(scores.reshape(layer.conv_groups, n_local), axis=1, kind="stable"), axis=1).reshape(-1)
    stored = low.to(torch.int8 if samples.signed else torch.uint8)
    errors = x.new_zeros(len(x), len(weight))
    for part in range(QUARTERS):
        new = rank * QUARTERS // n_local == part
        if not new.any():
            continue
        mask = torch.from_numpy(new)[groups]
        if layer.conv_groups == 1:  # the columns that change, alone
            errors += layer_outputs(layer, weight[:, mask], x[:, mask] - low[:, mask])
        else:
            errors += layer_outputs(layer, weight, torch.where(mask, x - low, 0.0))
        if samples.centred:
            errors -= errors.mean(dim=0)
        solve_groups(layer, new, stored, errors, centred=samples.centred, counting=counting, left=part + 1 < QUARTERS)


def present_weights(layer: QuantizedLayer, low: npt.NDArray[np.bool_]) -> Tensor:
    """float32 [O, I * taps]: the weights with the groups `low` (bool [n_groups]) read back."""
    assert layer.weight is not None
    weight = np.where(per_weight(layer, low), read_back_weights(layer), layer.weight) if low.any() else layer.weight
    return torch.from_numpy(weight.reshape(len(weight), -1).astype(np.float32))


def layer_outputs(layer: QuantizedLayer, weight: Tensor, inputs: Tensor) -> Tensor:
    """float32 [n, O]: products of rows of inputs [n, C * taps] with weights [O, I * taps], convolution group by group."""
    if layer.conv_groups == 1:
        return inputs @ weight.T
    parts = zip(inputs.chunk(layer.conv_groups, dim=1), weight.chunk(layer.conv_groups), strict=True)
    return torch.cat([x @ w.T for x, w in parts], dim=1)


def ridge(
    x: Tensor, wanted: Tensor, unit: Tensor, strengths: Sequence[float] = RIDGES, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What to add to the weights of inputs x [n, m] so that outputs move by `wanted` [n, O]: float64 [O, m]; x's covariance.

    x: integers, as float32 or in bytes; mean (float64 [m]) is taken from them. How far the weights are held back is chosen from
    `strengths` by the error on held-out rows, in real units (unit: [O]); where every change does harm there, nothing is changed:
    samples are few, and rows of one sample alike.
    """
    held = len(x) // HELD_OUT
    parts = [(x, wanted)] if not held else [(x[:-held], wanted[:-held]), (x[-held:], wanted[-held:])]
    sums = [_moments(a, b, mean) for a, b in parts]
    covariance, cross = (sum(own[i] for own in sums) / len(x) for i in range(2))
    assert isinstance(covariance, Tensor) and isinstance(cross, Tensor)

    def solved(products: Tensor, target: Tensor, damping: float) -> Tensor:
        products = products.clone()
        products.diagonal().add_(damping * float(products.diagonal().mean()) + 1e-6)
        single = products.dtype == torch.float32
        factor, failed = torch.linalg.cholesky_ex(products, check_errors=not single)
        if failed:
            return solved(products.double(), target.double(), damping).float()
        return torch.cholesky_solve(target.T, factor).T

    best, least = 0.0, 0.0
    scale = unit[:, None].float()
    (fit, fit_cross), (judged, judged_cross) = ([s.float() for s in own] for own in (sums[0], sums[-1]))  # enough to choose by
    for damping in strengths if held else ():
        change = solved(fit, fit_cross, damping) * scale
        gain = float((change @ judged * change).sum() - 2.0 * (change * judged_cross * scale).sum())
        if gain < least:
            best, least = damping, gain
    return (solved(covariance, cross, best) if best else torch.zeros_like(cross)), covariance


def _moments(x: Tensor, wanted: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [m, m], [O, m]: sums over rows of products of inputs less `mean` with each other, and with `wanted`."""
    rows = x.float()
    if x.is_floating_point() or not int8_products():
        rows = rows if mean is None else rows - mean.float()
        return (rows.T @ rows).double(), (wanted.T @ rows).double()
    cross = (wanted.T @ rows).double()
    if mean is not None:
        cross -= torch.outer(wanted.sum(dim=0, dtype=torch.float64), mean)
    return squared_sums(x, mean), cross


def _runs(groups: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Groups cut into runs of at most MOST_COLUMNS columns."""
    if not groups.size:
        return []
    ends = np.cumsum(widths[groups])
    return [run for run in np.split(groups, np.flatnonzero(np.diff((ends - 1) // MOST_COLUMNS)) + 1) if run.size]


def _shifts(target: Tensor, importance: Tensor, unit: Tensor, widths: Sequence[int], layer: QuantizedLayer) -> Tensor:
    """int64 [O, groups]: the shift of least rounding error of each group, tied over outputs as the granularity says.

    importance: [columns], what a squared error in a column costs while the columns behind it can still make up for it.
    """
    costs = []
    for shift in range(naive_shift(True, layer.wmax) + 1):
        step = 2.0**shift
        error = ((target / step).round_().clamp_(-layer.wmax, layer.wmax).mul_(step) - target).square_()
        weighed = torch.split(error.mul_(importance), list(widths), dim=1)
        costs.append(torch.stack([part.sum(dim=1) for part in weighed], dim=1))
    cost = torch.stack(costs) * unit[None, :, None] ** 2  # [shifts, O, groups]
    if layer.weight_granularity == "output":
        return cost.argmin(dim=0)
    size = BLOCK_ROWS if layer.weight_granularity == "block" else cost.shape[1]
    return torch.cat([b.sum(dim=1).argmin(dim=0).expand(b.shape[1], -1) for b in torch.split(cost, size, dim=1)])


def round_in_order(target: Tensor, covariance: Tensor, inverse: Tensor, step: Tensor, limit: int) -> Tensor:
    """float64 [O, m] integers of magnitude at most `limit`: `target / step` rounded column by column (GPTQ).

    target, step: [O, m]. covariance [m, m] of the inputs, damped, and its inverse. What matters most is rounded first, while
    most is still open.
    """
    order = torch.argsort(covariance.diagonal(), descending=True, stable=True)
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    rest = target.T[order].contiguous()  # [m, O]
    steps = step.T[order].contiguous()
    result = torch.empty_like(rest)
    columns = len(order)
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        errors = torch.empty_like(rest[a:b])
        for j in range(a, b):
            result[j] = (rest[j] / steps[j]).round_().clamp_(-limit, limit)
            errors[j - a] = (rest[j] - result[j] * steps[j]) / upper[j, j]
            rest[j + 1 : b].addr_(upper[j, j + 1 : b], errors[j - a], alpha=-1)
        rest[b:].addmm_(upper[a:b, b:].T, errors, alpha=-1)
    integers = torch.empty_like(target)
    integers[:, order] = result.T
    return integers
