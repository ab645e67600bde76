"""The instructions: every engine and exporter handles each, and what a hostile file may hold in them is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitdial.engines.cpu import compiler
from bitdial.engines.cuda import compiler as cuda
from bitdial.engines.reference import executor
from bitdial.errors import GraphError
from bitdial.export.c import lowering
from bitdial.export.onnx import export
from bitdial.finetuning import instructions as twin
from bitdial.graph.ir import Node
from bitdial.graph.running import Schedule
from bitdial.quantization.instructions import (
    INSTRUCTIONS,
    Add,
    Concat,
    Contract,
    Dequantize,
    Float,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Quantize,
    Window,
)

HEAD: dict[str, Any] = {"name": "y", "inputs": ("a", "b"), "source": ""}
ONE = HEAD | {"inputs": ("a",)}
PLAIN: dict[str, Any] = HEAD | {"activation": None}


@pytest.mark.parametrize("module", [executor, compiler, cuda, lowering, export, twin])
def test_every_instruction_has_a_handler(module: Any) -> None:
    own = {Contract, MatMul} if module is executor else {Contract} if module is twin else set()  # methods of those
    assert set(module.HANDLERS) | own == set(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (Quantize(**ONE, lo=0, hi=255, factor=float("nan")), "factor"),
        (Dequantize(**ONE, factor=float("inf")), "factor"),
        (Quantize(**ONE, lo=3, hi=2, factor=1.0), "clamps"),
        (Add(**PLAIN, lo=0, hi=256, factors=(1.0, 1.0)), "clamps"),
        (Add(**PLAIN, lo=0, hi=255, factors=(1.0,)), "factors"),
        (Concat(**PLAIN, lo=0, hi=255, factors=(1.0, float("nan")), axis=1), "factors"),
        (Lookup(**ONE, lo=0, hi=255, table=np.zeros(255, np.uint8), offset=0, function="relu", attrs={}), "256"),
        (Lookup(**ONE, lo=0, hi=255, table=np.zeros(256, np.uint8), offset=1, function="relu", attrs={}), "offset"),
        (Quantize(**HEAD, lo=0, hi=255, factor=1.0), "2 inputs instead of 1"),
        (Quantize(**ONE | {"name": ""}, lo=0, hi=255, factor=1.0), "no name"),
        (Add(**HEAD, activation={"kind": "exp"}, lo=0, hi=255, factors=(1.0, 1.0)), "activation"),
        (MaxPool(**ONE, window=Window((2, 2), (1, 0), (0, 0), (1, 1)), ceil_mode=False), "window"),
        (MaxPool(**ONE, window=Window((2, 2), (1,), (0, 0), (1, 1)), ceil_mode=False), "window"),
        (Float(**ONE, node=Node("y", "table", ["a"]), reason=""), "no float operator"),
        (Move(**ONE, node=Node("y", "pad", ["a"], {"pads": [[0, 0], [1, 1]], "value": 1.0})), "other than 0"),
        (Move(**ONE, node=Node("y", "relu", ["a"])), "does not move"),
    ],
)
def test_what_cannot_be_is_refused_by_name(broken: Any, word: str) -> None:
    with pytest.raises(GraphError, match=f"'y?'.*{word}"):
        broken.check()


def test_a_schedule_forgets_what_nobody_reads_any_more() -> None:
    nodes = [Node("a", "relu", ["x"]), Node("b", "add", ["a", "a"]), Node("c", "add", ["b", "w"]), Node("d", "relu", ["b"])]
    schedule = Schedule(nodes, {"w", "d"})
    alive: list[set[str]] = []
    values: dict[str, int] = {"x": 1}
    for node in schedule.walk(values):
        values[node.name] = 0
        alive.append(set(values))
    assert alive == [{"x", "a"}, {"a", "b"}, {"b", "c"}, {"b", "c", "d"}]
    assert set(values) == {"c", "d"}
    seen: list[str] = []
    schedule.run({"x": 1}, lambda node, own: 2 * sum(own.get(v, 0) for v in node.operands()), lambda n, _: seen.append(n))
    assert seen == ["a", "b", "c", "d"]
