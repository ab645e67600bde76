"""Post-training multi-bit quantization: blocks reconstructed for several widths together on calibration data.

Source: Xu et al., "PTMQ: Post-training Multi-Bit Quantization of Neural Networks" (AAAI 2024), and public re-implementations:
norm layers are folded; block by block, a low, a medium and a high width run side by side; their features are mixed with equal
weights (multi-bit feature mixer), and every element of what the next block sees is drawn from the mixture or from the
high width (probability 1/2); the group-wise distillation loss joins the distance of the mixture to the float block's output
with those of the medium and low features to the high ones, at equal weights.

Assumed, or changed: one set of weights serves all widths (narrow weights are the top bits of the 8-bit ones), so what the paper
learns as rounding (AdaRound's relaxation, at one weight width) is learned through rounding with straight-through gradients,
each weight within one low step of where it was; ranges of activations are of least squared error per width and not
learned; a block ends where a single value is alive in the graph; of several widths between the lowest and the highest
one is drawn per iteration as the medium one; the float block sees the float network's features, the quantized one the
mixed ones; means are restored at every width afterwards. Averages of 5 and 6 bits are whole widths of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.errors import ConfigError
from bitdial.finetuning.data import generator
from bitdial.graph.interpreter import constant_tensors, evaluate_node
from bitdial.graph.ir import Graph
from bitdial.quantization.instructions import Instruction
from comparison.widths import SharedWidths

LOW_STEP = 16  # 8-bit steps in a step of 4 bits
MIXED = 1.0 / 3.0  # weight of every width in the mixture
FROM_MIXTURE = 0.5  # probability that the next block sees an element of the mixture


@dataclass(frozen=True)
class Block:
    """nodes: of the float graph, in order. inputs: the one value that is alive before them; output: after them."""

    nodes: tuple[str, ...]
    inputs: str
    output: str


def blocks_of(graph: Graph, layers: Sequence[str]) -> list[Block]:
    """The graph cut wherever one value alone is alive; pieces without any of `layers` join the next one.

    Raises ConfigError for graphs with several inputs or outputs.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ConfigError("block-wise reconstruction needs a network with one input and one output")
    last: dict[str, int] = {graph.outputs[0]: len(graph.nodes)}
    for position, node in enumerate(graph.nodes):
        for value in node.data_operands():
            if value not in graph.constants:
                last[value] = max(last.get(value, -1), position)
    wanted, alive = set(layers), {graph.inputs[0]}
    blocks: list[Block] = []
    nodes: list[str] = []
    start = graph.inputs[0]
    for position, node in enumerate(graph.nodes):
        nodes.append(node.name)
        alive = {v for v in alive | {node.name} if last.get(v, -1) > position}
        if alive == {node.name} and wanted & set(nodes):
            blocks.append(Block(tuple(nodes), start, node.name))
            nodes, start = [], node.name
    if nodes and blocks:  # what follows the last layer
        final = blocks.pop()
        blocks.append(Block((*final.nodes, *nodes), final.inputs, graph.outputs[0]))
    return blocks


class _Segments:
    """The instructions of every width's program that belong to each block."""

    def __init__(self, shared: SharedWidths, blocks: Sequence[Block]) -> None:
        self.shared = shared
        self.steps: dict[tuple[int, int], list[Instruction]] = {}
        for bits in shared.widths:
            steps = shared.network(bits).schedule.steps
            names = [step.name for step in steps]
            start = 0
            for i, block in enumerate(blocks):
                stop = names.index(block.output) + 1 if i + 1 < len(blocks) else len(steps)
                self.steps[bits, i] = steps[start:stop]
                start = stop

    def run(self, bits: int, index: int, block: Block, x: Tensor) -> Tensor:
        """Output of a block at a width, in real units, for its input in real units."""
        network = self.shared.network(bits)
        program = network.program
        q = program.qparams.get(block.inputs)
        values = {block.inputs: x if q is None else torch.clamp(torch.round(x / q.scale), q.qmin, q.qmax).to(network.dtype)}
        result = x
        for step in self.steps[bits, index]:
            result = values[step.name] = network.step(step, values, 0, x.shape[0])
        name = self.steps[bits, index][-1].name
        out = program.qparams.get(name)
        return result.float() if out is None else result.float() * out.scale


def reconstruct(
    shared: SharedWidths,
    inputs: Tensor,
    *,
    iterations: int,
    batch_size: int,
    rate: float,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Reconstruct block after block in place. Returns JSON-able figures (first and last loss of every block, mean).

    inputs: calibration samples. iterations: per block. rate: of Adam, in low steps (4 bits) of each layer's weights.
    """
    ground = shared.ground
    graph = ground.prepared.graph
    blocks = blocks_of(graph, ground.layers)
    segments = _Segments(shared, blocks)
    draw = generator(seed, 11)
    constants = constant_tensors(graph)
    exact = mixed = inputs
    first, final = 0.0, 0.0
    high, low = shared.widths[0], shared.widths[-1]
    between = shared.widths[1:-1] or [low]
    for index, block in enumerate(blocks):
        target = _float_block(graph, block, exact, constants, batch_size)
        weights = [n for n in block.nodes if n in set(ground.layers)]
        losses = []
        leaves = _leaves(shared, weights)
        optimizer = torch.optim.Adam([{"params": [leaf], "lr": rate * step} for leaf, _, step in leaves])
        for _ in range(iterations):
            at = torch.randint(0, len(inputs), (min(batch_size, len(inputs)),), generator=draw)
            middle = between[int(torch.randint(0, len(between), (), generator=draw))]
            f_h, f_m, f_l = (segments.run(b, index, block, mixed[at]) for b in (high, middle, low))
            value = group_loss(target[at], f_h, f_m, f_l)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for leaf, origin, step in leaves:
                    leaf.copy_(torch.maximum(torch.minimum(leaf, origin + step), origin - step))
            losses.append(float(value.detach()))
        tenth = max(1, len(losses) // 10)
        first += sum(losses[:tenth]) / tenth / len(blocks)
        final += sum(losses[-tenth:]) / tenth / len(blocks)
        mixed = _mix(segments, index, block, mixed, (high, between[len(between) // 2], low), batch_size, draw)
        exact = target
        if progress is not None:
            progress((index + 1) / len(blocks))
    return {"blocks": float(len(blocks)), "first_loss": first, "last_loss": final}


def group_loss(target: Tensor, f_h: Tensor, f_m: Tensor, f_l: Tensor) -> Tensor:
    """Group-wise distillation loss: mixture to float output, medium to high, low to high; relative to the target's power."""
    mixture = MIXED * (f_h + f_m + f_l)
    power = target.square().mean().clamp_min(1e-12)
    parts = F.mse_loss(mixture, target) + F.mse_loss(f_m, f_h) + F.mse_loss(f_l, f_h)
    return parts / power


def _leaves(shared: SharedWidths, layers: Sequence[str]) -> list[tuple[Tensor, Tensor, float]]:
    """(weight, its values now, a low step) of every layer of a block."""
    result = []
    network = shared.network(shared.widths[0])
    for name in layers:
        source = shared.base.node(name).weight
        assert source is not None
        leaf = network.weights[source.replace(".", "__")]
        step = float(leaf.detach().flatten(1).abs().amax(dim=1).mean()) / 127.0 * LOW_STEP
        result.append((leaf, leaf.detach().clone(), step))
    return result


def _float_block(
    graph: Graph, block: Block, inputs: Tensor, constants: dict[str, Tensor], batch_size: int
) -> Tensor:
    """The float block's output for all samples."""
    by_name = graph.producers()
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            values = {block.inputs: inputs[start : start + batch_size]}
            n = values[block.inputs].shape[0]
            for name in block.nodes:
                node = by_name[name]
                operands = [values[v] if v in values else constants[v] for v in node.operands()]
                values[name] = evaluate_node(node, operands, n)
            parts.append(values[block.output])
    return torch.cat(parts)


def _mix(
    segments: _Segments, index: int, block: Block, inputs: Tensor, widths: Sequence[int], batch_size: int,
    draw: torch.Generator,
) -> Tensor:  # fmt: skip
    """What the next block sees: element by element the mixture of widths or the highest one's features."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            features = [segments.run(b, index, block, inputs[start : start + batch_size]) for b in widths]
            mixture = sum(features, torch.zeros_like(features[0])) / len(features)
            parts.append(torch.where(torch.rand(mixture.shape, generator=draw) < FROM_MIXTURE, mixture, features[0]))
    return torch.cat(parts)
