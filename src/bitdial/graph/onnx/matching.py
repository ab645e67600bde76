"""Looking from a value of a graph back to what makes it, for rewrites that put decomposed operations together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bitdial.graph.ir import Graph, Node


class Matcher:
    """Looks from a value back to what makes it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.readers: dict[str, int] = {}
        for node in graph.nodes:
            for value in node.operands():
                self.readers[value] = self.readers.get(value, 0) + 1
        for value in graph.outputs:
            self.readers[value] = self.readers.get(value, 0) + 1

    def of(self, value: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of these operators."""
        node = self.producers.get(value)
        return node if node is not None and node.op in ops and "activation" not in node.attrs else None

    def scalar(self, value: str) -> float | None:
        array = self.graph.constants.get(value)
        return float(array.reshape(())) if array is not None and array.size == 1 and array.dtype.kind == "f" else None

    def with_scalar(self, value: str, op: str) -> tuple[str, float] | None:
        """(x, c) of x op c, either way round."""
        node = self.of(value, op)
        if node is None:
            return None
        for x, c in (node.inputs, node.inputs[::-1]):
            number = self.scalar(c)
            if number is not None and x not in self.graph.constants:
                return x, number
        return None

    def factors(self, value: str, depth: int = 3) -> tuple[list[str], float]:
        """A product as its factors that are no numbers, and the number. The factors are those of products in it, so deep."""
        node = self.of(value, "mul")
        if node is None or not depth:
            return [value], 1.0
        found: list[str] = []
        number = 1.0
        for operand in node.inputs:
            own = self.scalar(operand)
            if own is not None:
                number *= own
            elif (inner := self.with_scalar(operand, "mul")) is not None:
                found.append(inner[0])
                number *= inner[1]
            elif self.of(operand, "mul") is not None and self.readers[operand] == 1:
                inner_factors, inner_number = self.factors(operand, depth - 1)
                found += inner_factors
                number *= inner_number
            else:
                found.append(operand)
        return found, number

    def become(self, node: Node, op: str, inputs: list[str], attrs: Mapping[str, object]) -> bool:
        """Make a node another operation of float32 values; False, and nothing done, where they are not."""
        if any(self.graph.types.get(v) is not None and self.graph.types[v].dtype != "float32" for v in inputs):
            return False
        node.op, node.inputs, node.attrs = op, inputs, dict(attrs)
        return True


Rewrite = Callable[[Matcher, Node], bool]  # whether it changed the node
