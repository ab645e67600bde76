"""Rankings to compare the layer-wise scores with, as losses for the same planner. NumPy only.

The older search of the same lab (named in QuantuneV2, arXiv 2501.07161): quantize one layer at a time, one validation run
each, then give the most sensitive layers the higher precision in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from bitdial.selection.layerwise.scores import FLOOR, LayerEvidence, Losses


def _spread(layers: Sequence[LayerEvidence], sensitivity: Sequence[float]) -> Losses:
    """A loss per layer at its lowest precision, carried over to the others in proportion to the errors of its operands."""
    result: Losses = {}
    for layer, value in zip(layers, sensitivity, strict=True):
        here = max(layer.operand_noise(layer.precisions[0]), FLOOR)
        result[layer.name] = {p: value * layer.operand_noise(p) / here for p in layer.precisions}
    return result


def one_by_one(
    layers: Sequence[LayerEvidence],
    measure: Callable[[str, str], float],
    progress: Callable[[float], None] = lambda share: None,
) -> Losses:
    """The n-run search. measure: (layer, its lowest precision) -> what quantizing this layer alone loses on the validation data,
    called once per layer. Negative results (a layer that quantization happens to improve) count as 0."""
    found = []
    for done, layer in enumerate(layers, start=1):
        found.append(max(float(measure(layer.name, layer.precisions[0])), 0.0))
        progress(done / len(layers))
    return _spread(layers, found)


def random_losses(layers: Sequence[LayerEvidence], seed: int) -> Losses:
    """Sensitivities drawn at random."""
    return _spread(layers, np.random.default_rng(seed).random(len(layers)).tolist())


def first_last(layers: Sequence[LayerEvidence], ends: Collection[str]) -> Losses:
    """First and last layers (`ends`) matter above all; the others equally, in proportion to their parameters, so that by density
    they are raised in order."""
    total = max(sum(layer.parameters for layer in layers), 1)
    return _spread(layers, [1e6 if layer.name in ends else layer.parameters / total for layer in layers])
