"""Class separability of feature maps, the layer score of CSMPQ.

Source: Wang, Jin, Zhang, Yu, "CSMPQ: Class Separability Based Mixed-Precision Quantization" (2022): TF-IDF, known from
text retrieval, measures how well a layer's feature maps tell classes apart; layers that separate less get fewer bits, and
a linear program over the scores meets the budget.

The formulas are not in the text we could read (abstract and summaries); assumed: a layer's feature map is its output after the
activation, as the mean of the magnitudes over positions, one number per sample and channel; documents are the classes
(means over their samples) or, as a setting, single samples; terms are the channels. Term frequency is a channel's
share of a document's total; a document holds a term if its value is at least the channel's mean over documents; inverse
document frequency is log(documents / documents that hold the term). The score is the mean over documents of the sum
over channels of TF * IDF: 0 where all documents look alike, log(documents) where each has a channel of its own. The
program is: maximise sum(score * bits) within the budget, solved over {4, 8} exactly (a linear program over two widths has at
most one layer between them). Without labels the float network's own answers name the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.errors import CalibrationError
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph

Documents = Literal["classes", "samples"]
Floats = npt.NDArray[np.float64]


def tf_idf_score(documents: Floats) -> float:
    """Mean over documents of the sum over terms of TF * IDF; within 0 .. log(documents).

    documents: float64 [documents, terms], >= 0. Raises CalibrationError for anything else.
    """
    x = np.asarray(documents, np.float64)
    if x.ndim != 2 or min(x.shape) < 1 or not np.isfinite(x).all() or (x < 0).any():
        raise CalibrationError("feature maps must be finite magnitudes [documents, terms] to be scored")
    total = x.sum(axis=1, keepdims=True)
    frequency = np.divide(x, total, out=np.zeros_like(x), where=total > 0)
    mean = x.mean(axis=0)
    held = (x >= mean * (1 - 1e-9)).sum(axis=0)  # at least one: the largest is no smaller than the mean
    return float((frequency * np.log(len(x) / held)).sum(axis=1).mean())


def class_means(features: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """float64 [classes that occur, channels]: mean feature vector of each class."""
    return np.stack([features[labels == k].mean(axis=0) for k in np.unique(labels)])


def layer_features(graph: Graph, layers: Sequence[str], batches: Sequence[Sequence[Tensor]]) -> tuple[dict[str, Floats], Floats]:
    """(layer -> float64 [n, channels] mean magnitudes of its output, outputs float64 [n, classes]) of the float network."""
    axes = {name: 1 if graph.node(name).op == "conv" else -1 for name in layers}
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: list[Tensor] = []
    n = 0

    def observe(name: str, x: Tensor) -> None:
        if name in axes:
            channels_last = x.abs().movedim(axes[name], -1)
            parts[name].append(channels_last.reshape(n, -1, channels_last.shape[-1]).double().mean(dim=1))

    constants = constant_tensors(graph)
    with torch.no_grad():
        for batch in batches:
            n = batch[0].shape[0]
            outputs.append(run_graph(graph, batch, observe=observe, constants=constants)[0].double())
    return {k: torch.cat(v).numpy() for k, v in parts.items()}, torch.cat(outputs).numpy()


def layer_separability(
    graph: Graph,
    layers: Sequence[str],
    batches: Sequence[Sequence[Tensor]],
    labels: npt.NDArray[np.int64] | None = None,
    documents: Documents = "classes",
) -> dict[str, float]:
    """Score of every layer's feature maps on calibration data. labels: int64 [n]; None: the network's own answers.

    Raises CalibrationError for labels that do not fit.
    """
    features, outputs = layer_features(graph, layers, batches)
    if labels is None:
        if documents == "classes" and outputs.ndim != 2:
            raise CalibrationError("the network has no class scores: pass labels, or documents = 'samples'")
        labels = outputs.argmax(axis=-1)
    if len(labels) != len(outputs):
        raise CalibrationError(f"{len(labels)} labels for {len(outputs)} calibration samples")
    return {
        name: tf_idf_score(class_means(x, labels) if documents == "classes" else x) for name, x in features.items()
    }
