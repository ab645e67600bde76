"""From what the two runs showed of every layer to the loss of each precision. NumPy only.

Source: QuantuneV2 (arXiv 2501.07161), local metrics; the paper leaves the exact score open. Here a metric gives every layer a
loss per precision, so that layers and precisions are compared on one scale:

  weight       relative squared error of the weights at that precision
  activation   relative squared error of the layer's inputs at that precision
  sqnr         how much the layer lowers the signal-to-quantization-noise ratio
  mse          mean squared difference of the layer's outputs between the float and the quantized run
  propagated   noise at the network's outputs, over their signal, that the layer's own operands cause: what they add at its
               output, carried on by the gains that the two runs show (`propagation`). Not in the paper

"Change in SQNR" can be read in four ways, a setting: "local", the noise that the layer's own operands add at its output, over
the output's variance, at every precision (both on the samples of the float run); "output", noise over signal at its output in
the quantized run; "power", that minus the same at its input; "decibel", the fall in dB between the two. The last two are 0
where a residual brings in a cleaner signal, and rank such layers too low: "local" is the default.

What is measured in the quantized run is so at the precision that the layer had there, and carried over to others in proportion
to the errors of its operands, weight plus activation (assumed: they add up, and the output's is in proportion).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitdial.errors import SelectionError
from bitdial.selection.layerwise.config import ALL_METRICS

Losses = dict[str, dict[str, float]]  # layer -> precision -> loss
FLOOR = 1e-12  # of a share of noise: keeps ratios and logarithms finite


@dataclass(frozen=True)
class LayerEvidence:
    """What is known of one layer.

    precisions         those possible for it, ascending
    weight_noise       precision -> relative squared error of the weights
    activation_noise   precision -> relative squared error of the inputs
    probe              its precision in the quantized run
    input_noise        noise over signal of its input in the quantized run; output_noise: of its output
    added_noise        precision -> noise that the layer itself adds at its output, over the output's variance
    propagated_noise   precision -> the same at the network's outputs, over their signal
    output_error       mean squared difference of its outputs between the two runs
    parameters, macs   weights and biases; multiply-accumulates per sample
    """

    name: str
    source: str
    precisions: tuple[str, ...]
    weight_noise: Mapping[str, float]
    activation_noise: Mapping[str, float]
    added_noise: Mapping[str, float]
    propagated_noise: Mapping[str, float]
    probe: str
    input_noise: float
    output_noise: float
    output_error: float
    parameters: int
    macs: int

    def operand_noise(self, precision: str) -> float:
        return self.weight_noise[precision] + self.activation_noise[precision]


def metric_values(layer: LayerEvidence, metric: str, sqnr_change: str = "local") -> dict[str, float]:
    """One metric of one layer: precision -> loss (>= 0). Raises SelectionError for an unknown metric."""
    if metric == "weight":
        return {p: layer.weight_noise[p] for p in layer.precisions}
    if metric == "activation":
        return {p: layer.activation_noise[p] for p in layer.precisions}
    if metric == "propagated":
        return {p: layer.propagated_noise[p] for p in layer.precisions}
    if metric == "sqnr" and sqnr_change == "local":
        return {p: layer.added_noise[p] for p in layer.precisions}
    if metric == "mse":
        measured = layer.output_error
    elif metric == "sqnr":
        before, after = max(layer.input_noise, FLOOR), max(layer.output_noise, FLOOR)
        if sqnr_change == "output":
            measured = after
        elif sqnr_change == "decibel":
            measured = max(10.0 * math.log10(after / before), 0.0)
        else:
            measured = max(after - before, 0.0)
    else:
        raise SelectionError(f"there is no metric {metric!r}: choose among {', '.join(ALL_METRICS)}")
    here = max(layer.operand_noise(layer.probe), FLOOR)
    return {p: measured * layer.operand_noise(p) / here for p in layer.precisions}


def layer_losses(layers: Sequence[LayerEvidence], metrics: Sequence[str], sqnr_change: str = "local") -> Losses:
    """Layer -> precision -> loss: the mean of the metrics, each divided by its sum over the layers at their lowest precision.

    A metric that is 0 everywhere says nothing and is left out. Linear in the number of layers. Raises SelectionError for no
    metric, an unknown one, or values that are not finite.
    """
    if not metrics:
        raise SelectionError(f"no metric given: choose among {', '.join(ALL_METRICS)}")
    totals: Losses = {layer.name: dict.fromkeys(layer.precisions, 0.0) for layer in layers}
    for metric in metrics:
        values = {layer.name: metric_values(layer, metric, sqnr_change) for layer in layers}
        if not all(math.isfinite(v) for own in values.values() for v in own.values()):
            raise SelectionError(f"metric '{metric}' is not finite for some layer: check the calibration data")
        scale = sum(own[layer.precisions[0]] for layer, own in zip(layers, values.values(), strict=True))
        if scale <= 0.0:
            continue
        for name, own in values.items():
            for precision, value in own.items():
                totals[name][precision] += value / scale / len(metrics)
    return totals
