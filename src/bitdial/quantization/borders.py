"""Where values change between 8 bits and float, counted on the float graph; and the fusion that changes them least often.

Source: QuantuneV2 (arXiv 2501.07161): mixed precision is slow where quantize/dequantize pairs stand around single operators, so
the graph is fused first and the best of the legal fusions is taken ("best IR"). The paper leaves open how candidates are
enumerated and compared; here: by the number of conversions, then by the number of operators, then the default fusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from bitdial.graph.ir import Graph
from bitdial.graph.passes import Choice, add_options, fused
from bitdial.quantization.domains import eight_bit_values, integer_layers, pads_input

MAX_EXHAUSTIVE = 64  # fusions tried one and all; above, each add is decided in turn, the others kept


@dataclass(frozen=True)
class Borders:
    """Conversions that a program makes per run.

    quantize        values turned from float to 8 bits, once each however many operators read them
    dequantize      values turned from 8 bits to float by an operation of their own
    float_outputs   integer layers that store float, the conversion being part of their epilogue
    operators       nodes of the graph
    """

    quantize: int
    dequantize: int
    float_outputs: int
    operators: int

    @property
    def conversions(self) -> int:
        return self.quantize + self.dequantize + self.float_outputs

    @property
    def pairs(self) -> int:
        """Quantize/dequantize pairs: ways into 8 bits or out of them, whichever are more."""
        return max(self.quantize, self.dequantize + self.float_outputs)

    def summary(self) -> dict[str, int]:
        """JSON-able."""
        return {
            "quantize": self.quantize, "dequantize": self.dequantize, "float_outputs": self.float_outputs,
            "operators": self.operators, "conversions": self.conversions, "pairs": self.pairs,
        }  # fmt: skip


def count_borders(graph: Graph, ignored: tuple[str, ...] = (), isolate: bool = False) -> Borders:
    """The conversions of the program that `build_program` makes of a float graph.

    isolate: every integer layer between a pair of its own, nothing stays in 8 bits between operators: what the method that
    QuantuneV2 is compared with does (one node at a time, unfused).
    """
    layers = integer_layers(graph, ignored)
    eight = set() if isolate else eight_bit_values(graph, layers, ignored)
    into: set[str] = set()
    out: set[str] = {v for v in graph.outputs if v in eight}
    for node in graph.nodes:
        residual = [] if node.residual is None else [node.residual]
        if node.name in layers:
            into.update(v for v in node.inputs if v not in eight)
            if node.name in eight:
                into.update(v for v in residual if v not in eight)
            else:
                out.update(v for v in residual if v in eight)
        elif node.name in eight:
            into.update(v for v in node.inputs if pads_input(node, graph))
        else:
            out.update(v for v in node.data_operands() if v in eight)
    return Borders(len(into), len(out), len(layers - eight), len(graph.nodes))


@dataclass(frozen=True)
class BestFusion:
    """The chosen fusion: its graph, value -> value of the unfused graph, the choice, its borders, how many were compared."""

    graph: Graph
    origins: dict[str, str]
    choice: dict[str, str]
    borders: Borders
    default: Borders
    compared: int


def with_precisions(graph: Graph, precisions: Mapping[str, str]) -> Graph:
    """A copy whose conv and linear nodes named in `precisions` carry that float precision ("float32" or "bfloat16"). The
    weights are still float32: see `store_bfloat16`."""
    result = graph.copy()
    for node in result.nodes:
        if node.name in precisions:
            node.attrs["precision"] = precisions[node.name]
    return result


def best_fusion(base: Graph, precisions: Mapping[str, str], ignored: tuple[str, ...] = ()) -> BestFusion:
    """The legal fusion of an unfused graph with the fewest conversions, given which layers run in float.

    base: as `bitdial.graph.passes.fold` returns it. precisions: float layers by name. Equal counts go to fewer operators, then
    to the default fusion. Exhaustive up to MAX_EXHAUSTIVE fusions; above, one add after another takes what is best with the
    others as they are (a local optimum, until nothing changes).
    """
    marked = with_precisions(base, precisions)
    options = add_options(marked)
    compared = 0

    def cost(choice: Choice) -> tuple[int, int]:
        nonlocal compared
        compared += 1
        borders = count_borders(fused(marked, choice)[0], ignored)
        return borders.conversions, borders.operators

    default = {add: takers[0] for add, takers in options.items()}
    best, least = default, cost(default)
    first = count_borders(fused(marked, default)[0], ignored)
    count = 1
    for takers in options.values():
        count *= len(takers)
    if count <= MAX_EXHAUSTIVE:
        for combination in product(*options.values()):
            choice = dict(zip(options, combination, strict=True))
            found = cost(choice)
            if found < least:
                best, least = choice, found
    else:
        changed = bool(precisions)  # with every layer in integers, no choice can beat the default's single region
        while changed:
            changed = False
            for add, takers in options.items():
                for taker in takers:
                    choice = {**best, add: taker}
                    if taker != best[add] and (found := cost(choice)) < least:
                        best, least, changed = choice, found, True
    graph, origins = fused(marked, best)
    return BestFusion(graph, origins, dict(best), count_borders(graph, ignored), first, compared)
