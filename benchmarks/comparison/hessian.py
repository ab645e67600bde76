"""HAWQ-style sensitivity: average Hessian trace of a layer's weights times the squared change that low precision makes to them.

Sources: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization" (2020): the trace, divided by the number of weights,
by Hutchinson's estimator; Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization" (2021): an integer linear program over
those sensitivities with a budget (here solved exactly by `budget.lower_at_least_cost`, which over two widths is the same).

Assumed: the loss is the cross-entropy on the calibration data, on labels if there are any, else on the float network's own
answers (HAWQ takes labelled training data); the Hessian is that of the float network with BatchNorm folded, taken in
evaluation mode; one random vector over all layers serves every layer at once (the cross terms have mean 0, and cost
variance only); the change of activations does not enter, as in HAWQ-V3; negative traces count as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.errors import CalibrationError
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of the trace of one layer's block of the Hessian, with its standard error over probes."""

    trace: float
    standard_error: float
    weights: int

    @property
    def average(self) -> float:
        """Mean eigenvalue: the trace divided by the number of weights."""
        return self.trace / self.weights


def hutchinson(loss: Tensor, parameters: Mapping[str, Tensor], probes: int, generator: torch.Generator) -> dict[str, Trace]:
    """Trace of every parameter's own block of the Hessian of a scalar loss: mean of v . (H v) over Rademacher vectors v.

    parameters: leaves of the loss that require gradients. Raises CalibrationError for fewer than one probe.
    """
    if probes < 1:
        raise CalibrationError(f"{probes} probes: Hutchinson's estimator needs at least 1 (50 are usual)")
    names = list(parameters)
    leaves = [parameters[n] for n in names]
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    connected = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    samples = np.zeros((probes, len(names)))
    for p in range(probes if connected else 0):
        vectors = [
            torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype).mul_(2.0).sub_(1.0) for leaf in leaves
        ]
        products = torch.autograd.grad(
            [gradients[i] for i in connected],
            leaves,
            [vectors[i] for i in connected],
            retain_graph=p + 1 < probes,
            allow_unused=True,
        )
        for i, product in enumerate(products):
            if product is not None:
                samples[p, i] = float((product.detach() * vectors[i]).double().sum())
    spread = samples.std(axis=0, ddof=1) / np.sqrt(probes) if probes > 1 else np.full(len(names), np.nan)
    return {
        n: Trace(float(samples[:, i].mean()), float(spread[i]), leaves[i].numel()) for i, n in enumerate(names)
    }


def cross_entropy(labels: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Logits [n, classes] -> mean cross-entropy, on labels [n] or, without them, on the network's own answers."""

    def loss(logits: Tensor) -> Tensor:
        target = logits.detach().argmax(dim=-1) if labels is None else labels
        return F.cross_entropy(logits, target)

    return loss


def layer_traces(
    graph: Graph,
    layers: Sequence[str],
    batches: Sequence[Sequence[Tensor]],
    labels: Sequence[npt.NDArray[np.int64]] | None = None,
    probes: int = 50,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Trace]:
    """Hessian traces of the weights of conv and linear layers of a float graph, averaged over batches.

    labels: one int64 [n] per batch; None: the network's own answers. probes: random vectors in all, shared out evenly over
    the batches (at least one for each). Raises CalibrationError for a network without class scores, or labels that do
    not fit.
    """
    weights = {}
    for name in layers:
        source = graph.node(name).weight
        assert source is not None
        weights[name] = source
    constants = constant_tensors(graph)
    leaves = {name: constants[w].clone().float().requires_grad_(True) for name, w in weights.items()}
    constants.update({weights[name]: leaf for name, leaf in leaves.items()})
    generator = torch.Generator().manual_seed(seed)
    per_batch = max(1, probes // max(1, len(batches)))
    found: list[dict[str, Trace]] = []
    for i, batch in enumerate(batches):
        logits = run_graph(graph, batch, constants=constants)[0]
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise CalibrationError(
                f"the network's output has shape {list(logits.shape)}, no scores of classes: a Hessian trace needs a loss"
            )
        own = None if labels is None else torch.from_numpy(np.asarray(labels[i], np.int64))
        if own is not None and (len(own) != len(logits) or int(own.min()) < 0 or int(own.max()) >= logits.shape[1]):
            raise CalibrationError(f"labels of calibration batch {i} do not fit outputs of shape {list(logits.shape)}")
        found.append(hutchinson(cross_entropy(own)(logits), leaves, per_batch, generator))
        if progress is not None:
            progress((i + 1) / len(batches))
    result = {}
    for name in layers:
        values = np.array([f[name].trace for f in found])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else found[0][name].standard_error
        result[name] = Trace(float(values.mean()), error, found[0][name].weights)
    return result
