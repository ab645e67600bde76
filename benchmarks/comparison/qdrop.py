"""Blocks reconstructed with quantization of activations dropped at random, in the manner of QDrop.

Source: Wei, Gong, Li, Liu, Yu, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (ICLR
2022): block after block, the rounding of weights is learned (AdaRound: Nagel et al. 2020; by blocks: BRECQ, Li et al. 2021) so
that the block gives what the float block gives; while it is, every element of a quantized activation, the block's input
among them, keeps its value of full precision with probability 1/2.

Assumed, or changed: steps of activations are of least squared error and not learned; some hundred iterations per block instead of
20,000, with a rate to match; layers that stay at 8 bits are float while a block is learned; a block ends where a single value is
alive in the graph; means are restored in the program that comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitdial.finetuning.data import generator
from bitdial.finetuning.rounding import keep_some, round_clamp
from bitdial.graph.interpreter import constant_tensors, evaluate_node
from bitdial.quantization.effective_bits import low_limit
from bitdial.quantization.program import Program
from comparison.ground import Ground
from comparison.ptmq import Block, blocks_of
from comparison.uniform import LowWeights, least_squares_top, least_squares_weight_scale, uniform_program

STRETCH = 1.2  # of the sigmoid, clipped to 0..1
WARM_UP = 0.2  # share of the iterations without the penalty
SHARPNESS = (20.0, 2.0)  # of the penalty, from .. to
PENALTY = 0.1  # its weight beside the relative squared error
_STREAM = 17


@dataclass
class SoftWeight:
    """A weight between two neighbouring integers: (below + h(v)) * scale, h in 0..1. scale: float32, broadcastable."""

    below: Tensor
    v: Tensor
    scale: Tensor
    limit: int

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, limit: int) -> SoftWeight:
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        steps = (weight / scale).clamp(-limit, limit)
        below = steps.floor().clamp(max=limit - 1)
        share = ((steps - below + (STRETCH - 1.0) / 2.0) / STRETCH).clamp(1e-4, 1.0 - 1e-4)
        return cls(below, torch.logit(share).requires_grad_(), scale, limit)

    def share(self) -> Tensor:
        return (torch.sigmoid(self.v) * STRETCH - (STRETCH - 1.0) / 2.0).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        return (self.below + self.share()) * self.scale

    def integers(self) -> Tensor:
        """The rounding that was learned."""
        return self.below + (self.share().detach() >= 0.5)

    def penalty(self, sharpness: float) -> Tensor:
        """Mean over the weights of how far they are from a decision, 0..1."""
        return (1.0 - (2.0 * self.share() - 1.0).abs().pow(sharpness)).mean()


@dataclass(frozen=True)
class Step:
    """How a layer's input is quantized: scale, smallest and largest integer."""

    scale: float
    lo: int
    hi: int

    def __call__(self, x: Tensor) -> Tensor:
        return round_clamp(x / self.scale, self.lo, self.hi) * self.scale


class Reconstruction:
    """The float network with soft weights and quantized inputs in its low layers."""

    def __init__(self, ground: Ground, bits: int) -> None:
        self.graph = ground.prepared.graph
        self.constants = constant_tensors(self.graph)
        self.nodes = self.graph.producers()
        self.steps: dict[str, Step] = {}
        self.soft: dict[str, SoftWeight] = {}
        for name in ground.layers:
            node, q = self.graph.node(name), ground.eight.qparams[ground.eight.instruction(name).inputs[0]]
            assert node.weight is not None
            levels, limit = low_limit(bits, q.signed), low_limit(bits, True)
            top = max(least_squares_top(ground.prepared.statistics[node.inputs[0]], levels), 2.0**-30)
            self.steps[name] = Step(top / levels, -levels if q.signed else 0, levels)
            scale = least_squares_weight_scale(self.graph.constants[node.weight], limit)
            self.soft[name] = SoftWeight.of(self.constants[node.weight], torch.from_numpy(scale).float(), limit)

    def run(
        self, block: Block, x: Tensor, *, weight: Callable[[SoftWeight], Tensor] | None, drop: torch.Generator | None = None
    ) -> Tensor:
        """Output of a block. weight: of a low layer, None: the float block. drop: keeps inputs of full precision at random."""
        values = {block.inputs: x}
        for name in block.nodes:
            node = self.nodes[name]
            operands = [values[v] if v in values else self.constants[v] for v in node.operands()]
            if weight is not None and name in self.soft:
                exact = operands[0]
                quantized = self.steps[name](exact)
                operands[0] = quantized if drop is None else torch.where(keep_some(exact, drop), exact, quantized)
                operands[len(node.inputs)] = weight(self.soft[name])
            values[name] = evaluate_node(node, operands, x.shape[0])
        return values[block.output]

    def all_samples(self, block: Block, x: Tensor, batch: int, weight: Callable[[SoftWeight], Tensor] | None) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.run(block, part, weight=weight) for part in torch.split(x, batch)])


def hard(weight: SoftWeight) -> Tensor:
    return weight.integers() * weight.scale


def reconstruct(
    network: Reconstruction, ground: Ground, *, iterations: int, batch_size: int, rate: float, progress: Callable[[float], None]
) -> dict[str, float]:
    """Learn the rounding of all low layers, block after block. Returns mean first and last relative error of the blocks.

    iterations: per block. rate: of Adam, on the arguments of the sigmoids.
    """
    blocks = blocks_of(network.graph, ground.layers)
    draw = generator(ground.config.seed, _STREAM)
    exact = rough = ground.prepared.inputs[0]
    first = last = 0.0
    warm = int(WARM_UP * iterations)
    for index, block in enumerate(blocks):
        target = network.all_samples(block, exact, batch_size, None)
        power = target.var().clamp_min(1e-12)
        own = [network.soft[n] for n in block.nodes if n in network.soft]
        optimizer = torch.optim.Adam([w.v for w in own], lr=rate)
        errors = []
        for i in range(iterations):
            at = torch.randint(0, len(exact), (min(batch_size, len(exact)),), generator=draw)
            x = torch.where(keep_some(exact[at], draw), exact[at], rough[at])
            error = (network.run(block, x, weight=SoftWeight.soft, drop=draw) - target[at]).square().mean() / power
            loss = error
            if i >= warm:
                gone = (i - warm) / max(1, iterations - warm)
                sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * gone
                loss = error + PENALTY * torch.stack([w.penalty(sharpness) for w in own]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            errors.append(float(error.detach()))
        tenth = max(1, len(errors) // 10)
        first += sum(errors[:tenth]) / tenth / len(blocks)
        last += sum(errors[-tenth:]) / tenth / len(blocks)
        exact, rough = target, network.all_samples(block, rough, batch_size, hard)
        progress((index + 1) / len(blocks))
    return {"blocks": float(len(blocks)), "first_loss": first, "last_loss": last}


def found_weights(soft: Mapping[str, SoftWeight]) -> dict[str, LowWeights]:
    return {
        n: LowWeights(w.integers().numpy().astype(np.int64), w.scale.flatten().numpy().astype(np.float64))
        for n, w in soft.items()
    }


def dropped_program(
    ground: Ground, bits: int, *, iterations: int, batch_size: int, rate: float
) -> tuple[Program, dict[str, float]]:
    """(every eligible layer at a width of 2 to 7 bits with learned rounding, figures of the reconstruction)."""
    network = Reconstruction(ground, bits)
    figures = reconstruct(
        network, ground, iterations=iterations, batch_size=batch_size, rate=rate,
        progress=lambda share: ground.progress("reconstruct", share),
    )  # fmt: skip
    program = uniform_program(
        ground.prepared, ground.config, ground.full_masks(), bits, given=found_weights(network.soft)
    )  # fmt: skip
    return program, figures
