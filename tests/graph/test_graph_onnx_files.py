"""ONNX files that are damaged, hostile or beyond what is read: one typed error that names the thing and the remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import ELEMENTS, check, imported, model

import bitdial
from bitdial.errors import CaptureError, ConfigError
from bitdial.graph.onnx import OnnxNetwork, is_onnx, read_onnx
from bitdial.zoo.registry import build_model

X = {"x": np.zeros((2, 4), np.float32)}
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def linear() -> Any:
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], X, {"w": WEIGHT})


def refuse(proto: Any, folder: Path, match: str, inputs: Any = X) -> None:
    with pytest.raises(CaptureError, match=match):
        imported(proto, inputs, folder)


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(CaptureError, match="m.onnx cannot be read .*No such file"):
        read_onnx(path)
    with pytest.raises(CaptureError, match="Is a directory|no regular file"):
        read_onnx(tmp_path)
    for content in (b"", b"hello, this is text", bytes(range(256)) * 40):
        path.write_bytes(content)
        with pytest.raises(CaptureError, match="no ONNX|of opset 0|no ONNX graph"):
            read_onnx(path)


def test_every_truncation_and_many_flips_end_in_typed_errors(tmp_path: Path) -> None:
    """Nothing but CaptureError, whatever byte is missing or another; never a graph of a cut weight."""
    data, path = linear().SerializeToString(), tmp_path / "m.onnx"
    rng = np.random.default_rng(0)
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        with pytest.raises(CaptureError):
            OnnxNetwork(path).graph([torch.zeros(2, 4)])
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        try:
            OnnxNetwork(path).graph([torch.zeros(2, 4)])
        except CaptureError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("dims", [[4, 4], [2**40, 3], [4, -3], [2**31, 2**31, 2**31], [1] * 100, [0, 3]])
def test_tensors_whose_size_is_not_that_of_their_bytes(dims: list[int], tmp_path: Path) -> None:
    proto = linear()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    refuse(proto, tmp_path, "the tensor 'w'")
    tensor = TensorProto(name="w", data_type=1, dims=dims, float_data=list(map(float, range(12))))
    proto.graph.initializer[0].CopyFrom(tensor)
    refuse(proto, tmp_path, "the tensor 'w'")


def test_external_data_come_from_the_models_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(WEIGHT.tobytes())
    (folder / "inside.bin").write_bytes(b"1234" + WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")

    def external(location: str, offset: object = 0, length: object = 48) -> Any:
        proto = linear()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return proto

    path = folder / "m.onnx"
    path.write_bytes(external("inside.bin", 4).SerializeToString())
    np.testing.assert_array_equal(read_onnx(path).constants["w"], WEIGHT)
    for location in ("../outside.bin", str(tmp_path / "outside.bin"), "link.bin", "", "a/../../outside.bin"):
        path.write_bytes(external(location).SerializeToString())
        with pytest.raises(CaptureError, match="outside the model's folder: move it inside"):
            read_onnx(path)
    for bad, match in (
        (external("missing.bin"), "cannot be read .No such file"), (external("inside.bin", 8), "beyond the end"),
        (external("inside.bin", 0, 2**50), "names 1125899906842624"), (external("inside.bin", -4), "from -4"),
        (external("inside.bin", "x"), "cannot be read"), (external("."), "outside|no regular|cannot be read"),
    ):  # fmt: skip
        path.write_bytes(bad.SerializeToString())
        with pytest.raises(CaptureError, match=match):
            read_onnx(path)


def test_graphs_that_are_no_graphs(tmp_path: Path) -> None:
    def of(*nodes: Any, **more: Any) -> Any:
        return model(nodes, X, {"w": WEIGHT}, **more)

    make = helper.make_node
    circle = [make("Add", ["x", "b"], ["a"]), make("Relu", ["a"], ["b"]), make("Relu", ["b"], ["y"])]
    refuse(of(*circle), tmp_path, "'b'.*in a circle")
    refuse(of(make("Relu", ["y"], ["y"])), tmp_path, "Relu 'y' reads 'y'")
    refuse(of(make("Relu", ["nowhere"], ["y"])), tmp_path, "reads 'nowhere'")
    refuse(of(make("Relu", ["x"], ["y"]), make("Relu", ["x"], ["y"])), tmp_path, "'y'.*is there already")
    refuse(of(make("Relu", ["x"], ["x"]), make("Relu", ["x"], ["y"])), tmp_path, "'x'.*is there already")
    refuse(of(make("Relu", ["x"], ["z"])), tmp_path, "output 'y' is computed by no node")
    refuse(of(make("MatMul", ["x"], ["y"])), tmp_path, "MatMul 'y' cannot be read")
    refuse(of(make("MatMul", ["w", "x"], ["y"])), tmp_path, "MatMul 'y' cannot be read")
    refuse(of(make("Transpose", ["x"], ["y"], perm=[0, 7])), tmp_path, "axis 7")
    refuse(of(make("Transpose", ["x"], ["y"], perm="text")), tmp_path, "Transpose 'y' cannot be read")
    refuse(of(make("Conv", ["x", "w"], ["y"])), tmp_path, "Conv 'y' cannot be read")
    refuse(of(make("Reshape", ["x", "x"], ["y"])), tmp_path, "its input 1 is computed from the model's inputs")
    refuse(of(make("ConstantOfShape", ["x"], ["y"])), tmp_path, "its input 0 is computed from the model's inputs")
    refuse(of(make("Unsqueeze", ["x"], ["y"], axes=[1, 1]), opset=11), tmp_path, "name one twice")
    refuse(of(make("Cast", ["w"], ["b"], to=9), make("MatMul", ["x", "b"], ["y"])), tmp_path, "multiplies float32 and bool")
    product = [make("Mul", ["x" if i == 0 else f"p{i}"] * 2, [f"p{i + 1}"]) for i in range(3000)]
    imported(of(*product, make("Identity", ["p3000"], ["y"])), X, tmp_path)  # deep, and sound


def test_sizes_beyond_all_bounds(tmp_path: Path) -> None:
    make = helper.make_node
    huge = np.array([2**20, 2**20], np.int64)
    for nodes in (
        [make("ConstantOfShape", ["n"], ["c"]), make("ReduceSum", ["c"], ["s"]), make("Add", ["x", "s"], ["y"])],
        [make("Expand", ["w", "n"], ["c"]), make("ReduceSum", ["c"], ["s"]), make("Add", ["x", "s"], ["y"])],
        [make("Tile", ["x", "n"], ["c"]), make("ReduceSum", ["c"], ["y"])],
        [make("Pad", ["x", "p"], ["c"]), make("ReduceMax", ["c"], ["y"], axes=[1])],
        [make("Range", ["zero", "many", "one"], ["r"]), make("Gather", ["w", "r"], ["g"]), make("Add", ["x", "g"], ["y"])],
        [make("Unsqueeze", ["x", "first"], ["u"]), make("Resize", ["u", "", "scales"], ["y"])],
    ):  # fmt: skip
        constants = {
            "n": huge, "w": np.ones((1, 1), np.float32), "p": np.array([0, 0, 0, 2**40]), "zero": np.array(0),
            "many": np.array(2**50), "one": np.array(1), "first": np.array([1]), "scales": np.float32([1, 1, 1e12]),
        }  # fmt: skip
        refuse(model(nodes, X, constants), tmp_path, "cannot be read")


def test_unknown_operators_are_named_all_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="/find"), helper.make_node("NonZero", ["x"], ["b"]),
        helper.make_node("Mystery", ["a", "b"], ["y"], name="/secret", domain="com.example"),
        helper.make_node("Unread", ["x"], ["z"]),  # nothing needs it
    ]  # fmt: skip
    told = r"3 nodes have 2 operator\(s\) .*NonZero \(2: /find, node 1\); com.example.Mystery \(1: /secret\)\. Export"
    refuse(model(nodes, X), tmp_path, told)


def test_quantized_half_and_old_models_are_refused_with_the_remedy(tmp_path: Path) -> None:
    make = helper.make_node
    scale = {"s": np.float32(0.1), "z": np.uint8(3)}
    quantized = model([make("QuantizeLinear", ["x", "s", "z"], ["y"])], X, scale, dtype="uint8")
    refuse(quantized, tmp_path, "quantized already.*float model")
    half = {"x": np.zeros((2, 4), np.float16)}
    refuse(model([make("Relu", ["x"], ["y"])], half, dtype="float16"), tmp_path, "'x' is float16.*float32", half)
    refuse(model([make("MatMul", ["x", "w"], ["y"])], X, {"w": WEIGHT.astype(np.float16)}), tmp_path, "'w' is float16")
    refuse(model([make("Cast", ["x"], ["y"], to=10)], X, dtype="float16"), tmp_path, "element type 10")
    refuse(model([make("Relu", ["x"], ["y"])], X, opset=9), tmp_path, "opset 9.*convert_version")
    refuse(model([make("Add", ["x", "w"], ["y"])], X, {"w": np.float32(["nan"])}), tmp_path, "NaN or .infinity")
    double = {"x": np.zeros((2, 4), np.float64)}
    wide = model([make("MatMul", ["x", "w"], ["y"])], double, {"w": WEIGHT.astype(np.float64)}, dtype="float64")
    imported(wide, double, tmp_path)  # runs in float, as it says
    text = helper.make_tensor_value_info("x", TensorProto.STRING, ["N", 2])
    proto = model([make("Identity", ["x"], ["y"])], X)
    proto.graph.input[0].CopyFrom(text)
    refuse(proto, tmp_path, "its input 'x' is")


def test_functions_of_the_file_are_refused_with_the_remedy(tmp_path: Path) -> None:
    proto = model([helper.make_node("Own", ["x"], ["y"], domain="here")], X)
    body = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("here", "Own", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    refuse(proto, tmp_path, "inline_local_functions")


def test_inputs(tmp_path: Path) -> None:
    """Names that Python has no room for, initializers among the inputs, sizes left open."""
    names = ["x.1", "class", "0", "x-1"]
    inputs = {name: np.ones((2, 3), np.float32) for name in names}
    nodes = [helper.make_node("Sum", names, ["s"]), helper.make_node("Add", ["s", "w"], ["y"])]
    proto = model(nodes, inputs, {"w": WEIGHT[0]})
    proto.graph.input.append(helper.make_tensor_value_info("w", ELEMENTS["float32"], [3]))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    network = OnnxNetwork(path)
    assert list(network.signature.parameters) == ["x_1", "class_", "v0", "x_1_3"]
    graph, (y,) = imported(proto, inputs, tmp_path)
    assert graph.inputs == ["x_1", "class_", "v0", "x_1_1"] and y.tolist() == [[4.0, 5.0, 6.0]] * 2
    proto = linear()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    onnx.save(proto, path)
    with pytest.raises(CaptureError, match=r"sizes of its input 'x' open, float32\[N, \?\]"):
        bitdial.graph.onnx.import_graph(read_onnx(path))  # type: ignore[attr-defined]
    two = model([helper.make_node("Add", ["x", "z"], ["y"])], {"x": X["x"], "z": X["x"]}, batch=2)
    two.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 3
    refuse(two, tmp_path, "different first sizes", {"x": X["x"], "z": X["x"]})


def test_a_file_for_a_batch_of_four_takes_any(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["r"]), helper.make_node("Softmax", ["r"], ["y"])]
    proto = model(nodes, X, {"s": np.array([8, 2])}, batch=4)
    graph, (y,) = imported(proto, {"x": np.zeros((3, 4), np.float32)}, tmp_path)
    assert str(graph.types[graph.outputs[0]]) == "float32[2N, 2]" and y.shape == (6, 2)


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(linear(), path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CaptureError, match=r"pip install 'bitdial\[onnx\]'"):
        read_onnx(path)


def test_models_by_path(tmp_path: Path) -> None:
    path = tmp_path / "M.ONNX"
    onnx.save(linear(), path)
    assert is_onnx(path) and is_onnx(str(path)) and not is_onnx("zoo:digits") and not is_onnx(None)
    assert isinstance(build_model(str(path)), OnnxNetwork)
    with pytest.raises(ConfigError, match="brings its weights"):
        build_model(str(path), num_classes=10)
    with pytest.raises(CaptureError, match="missing.onnx cannot be read"):
        bitdial.quantize(tmp_path / "missing.onnx", np.zeros((2, 4)))


def test_numbers_written_one_by_one_and_sparse_ones(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=1, dims=[4, 3], float_data=WEIGHT.ravel().tolist()))
    graph, _ = imported(proto, X, tmp_path)
    np.testing.assert_array_equal(graph.constants[graph.nodes[0].weight or ""], WEIGHT.T)
    proto = model([helper.make_node("Gather", ["x", "i"], ["y"], axis=1)], X)
    proto.graph.initializer.append(TensorProto(name="i", data_type=6, dims=[2], int32_data=[1, 0]))
    imported(proto, X, tmp_path)
    sparse = linear()
    values = numpy_helper.from_array(np.float32([1.0]), "w")
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0]), "i"), [4, 3]))
    del sparse.graph.initializer[0]
    refuse(sparse, tmp_path, "sparse")


def test_tied_weights_stay_one_constant(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]  # fmt: skip
    graph = check(tmp_path, nodes, X, {"w": np.eye(4, dtype=np.float32)})
    assert len(graph.constants) == 1
