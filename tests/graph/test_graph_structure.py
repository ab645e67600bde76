"""Outputs come back nested and named as the network gives them: after quantizing, after loading, from files of strangers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from bitdial.api import QuantizedModel
from bitdial.artifact import from_bytes, to_bytes
from bitdial.benchmarking.accuracy import _tensor
from bitdial.errors import ArtifactError, CaptureError, GraphError
from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from bitdial.graph.structure import NamedOutputs, RecordOutputs, check_structure, output_names, restore
from bitdial.serving.worker.model import _output_infos
from hand_built import program_of

Detections = namedtuple("Detections", "boxes scores")


@dataclasses.dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As that of transformers: a dataclass and a dict in one; fields that are None are not in the dict."""

    logits: Any = None
    hidden: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "loss"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


@dataclasses.dataclass
class Plain:
    score: Any
    rest: Any


class Box:
    """A container that only torch's registry knows."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


_pytree.register_pytree_node(
    ModelOutput,
    lambda o: (list(o.values()), list(o)),
    lambda values, names: ModelOutput(**dict(zip(names, values, strict=True))),
    serialized_type_name="test.ModelOutput",
)
_pytree.register_pytree_node(
    Box, lambda b: (list(b.parts), None), lambda parts, _: Box(*parts), serialized_type_name="test.Box"
)
torch.export.register_dataclass(Plain, serialized_type_name="test.Plain")


class Returns(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x), x)


def model_of(function: Any, x: Tensor, network: nn.Module | None = None) -> tuple[QuantizedModel, QuantizedModel]:
    """The program in the reference engine, and stored and loaded in the compiled one."""
    program = program_of(optimize(capture(network or Returns(function), (x,))), [0.0])
    loaded = from_bytes(to_bytes(program))
    assert loaded.structure == program.structure
    return QuantizedModel(program, "reference"), QuantizedModel(loaded, "cpu")


def same(got: Any, want: Any) -> None:
    """Equal containers, names and values."""
    assert type(got) is type(want), (got, want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    else:
        assert got is want is None


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y,
        lambda y, x: (y, x),
        lambda y, x: (y,),
        lambda y, x: [y, x],
        lambda y, x: {"logits": y, "input": x, "again": y, "loss": None},
        lambda y, x: (y, {"parts": [x, (y * 2,)], 3: {"deep": y}}, None),
        lambda y, x: OrderedDict(b=y, a=x),
    ],
    ids=["one", "tuple", "tuple of one", "list", "dict", "nested", "ordered"],
)
def test_containers(function: Any) -> None:
    network, x = Returns(function), torch.randn(3, 4)
    for qm in model_of(function, x, network):
        want = network(x)
        same(qm(x), dict(want) if isinstance(want, OrderedDict) else want)
        arrays = _pytree.tree_leaves(qm(x.numpy()))
        assert all(a is None or isinstance(a, np.ndarray) for a in arrays)
        torch.testing.assert_close(_tensor(qm(x)), _tensor(want))


def test_names() -> None:
    x = torch.randn(3, 4)
    network = Returns(lambda y, x: ModelOutput(logits=y, hidden=Detections(x, (y, Plain(y + 1, Box(x, [y]))))))
    y = network.linear(x)
    for qm in model_of(None, x, network):
        out = qm(x)
        assert type(out) is RecordOutputs and list(out) == ["logits", "hidden"]
        for logits in (out.logits, out["logits"], out[0], out.to_tuple()[0]):
            torch.testing.assert_close(logits, y)
        boxes, scores = out.hidden
        assert type(out.hidden) is NamedOutputs and out.hidden._fields == ("boxes", "scores")
        torch.testing.assert_close(boxes, x)
        assert scores is out.hidden.scores
        torch.testing.assert_close(scores[1].score, y + 1)
        rest = scores[1].rest
        assert isinstance(rest, tuple) and isinstance(rest[1], list)  # a Box: no form as data
        for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):  # noqa: S301
            same(twin, out)
            assert twin.hidden._fields == out.hidden._fields
        with pytest.raises(AttributeError, match="no output 'other'"):
            out.other  # noqa: B018
        with pytest.raises(AttributeError, match="no output 'other'"):
            out.hidden.other  # noqa: B018
        graph = qm.program.graph
        names = output_names(graph.structure, graph.outputs)
        assert names[:3] == ["logits", "hidden.boxes", "hidden.scores.0"] and len(set(names)) == len(names) == 6


def test_the_server_names_outputs() -> None:
    x = torch.randn(3, 4)
    for function, expected in (
        (lambda y, x: {"logits": y, "parts": [y * 2, y]}, ["logits", "parts.0", "parts.1"]),
        (lambda y, x: (y, y), ["linear", "linear_2"]),
    ):
        program = program_of(optimize(capture(Returns(function), (x,))), [0.0])
        found = QuantizedModel(program, "reference").engine.run(x[:1].numpy())
        assert [info.name for info in _output_infos(program, found, "m.bitdial")] == expected


def test_what_has_no_form_as_data() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(Returns(lambda y, x: {"loss": None}), (x,))

    def deep(y: Tensor, x: Tensor) -> Any:
        result: Any = y
        for _ in range(20):
            result = [result]
        return result

    with pytest.raises(CaptureError, match="nested deeper than 16"):
        capture(Returns(deep), (x,))


def test_files_without_a_structure_load() -> None:
    """Files from before there was one: a tuple of values, as then."""
    x = torch.randn(2, 4)
    program = program_of(optimize(capture(Returns(lambda y, x: {"a": y, "b": x}), (x,))), [0.0])
    assert b'"structure"' not in to_bytes(
        program_of(optimize(capture(Returns(lambda y, x: (y, x)), (x,))), [0.0])
    ).replace(b'\\"', b'"')
    program.structure = None
    result = QuantizedModel(from_bytes(to_bytes(program)))(x)
    assert type(result) is tuple and len(result) == 2


@pytest.mark.parametrize(
    "structure",
    [
        0, {}, "dict", [], ["dict"], ["set", [0, 1]], ["tuple", [0]], ["tuple", [0, 0]], ["tuple", [0, 1, 2]],
        ["tuple", [0, True]], ["tuple", [0, "1"]], ["tuple", [0, 1.0]], ["dict", [0, 1]], ["dict", [["a", 0], ["a", 1]]],
        ["dict", [["a", 0], [None, 1]]], ["dict", [["a", 0], [[1], 1]]], ["record", [["a", 0], [1, 1]]],
        ["named", [["a", 0], ["b", 1, 2]]], ["list", {"0": 0}], ["list", [0, ["list", 1]]], ["list", [0, 1], 2],
    ],
    ids=str,
)  # fmt: skip
def test_malformed_structures_are_refused(structure: Any) -> None:
    with pytest.raises(GraphError, match="structure of the outputs is malformed"):
        check_structure(structure, 2)


def test_hostile_structures_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(optimize(capture(Returns(lambda y, x: {"a": y, "b": x}), (torch.randn(2, 4),))), [0.0])
    for structure in (["tuple", [0]], ["dict", [["a", 0], ["b", 7]]]):
        program.structure = structure
        with pytest.raises(ArtifactError, match="structure of the outputs"):
            to_bytes(program)
        with monkeypatch.context() as patch:
            patch.setattr("bitdial.artifact.store.check_program", lambda *_: None)  # the writer of such a file has no checks
            data = to_bytes(program)
        with pytest.raises(ArtifactError, match="structure of the outputs"):
            from_bytes(data)
    deep: Any = 0
    for _ in range(17):
        deep = ["list", [deep]]
    with pytest.raises(GraphError, match="malformed"):
        check_structure(deep, 1)
    # names are only names: those of methods and of Python's own attributes hide nothing
    out = restore(["record", [["__class__", 0], ["keys", 1], ["__deepcopy__", 2]]], (1, 2, 3))
    assert type(out) is RecordOutputs and list(out.keys()) == ["__class__", "keys", "__deepcopy__"]
    assert copy.deepcopy(out) == out
