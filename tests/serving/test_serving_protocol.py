"""Requests and answers of the inference protocol, without a server: what is right goes through, what is wrong is named."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdial.errors import ConfigError
from bitdial.serving.errors import BadRequest, ComputeFailed, ServingError, TooLarge, UnsupportedEncoding
from bitdial.serving.protocol import (
    RequestReader,
    decode_body,
    error_body,
    infer_response,
    model_config,
    model_metadata,
)
from bitdial.serving.protocol.datatypes import DATATYPES, datatype_of, numpy_dtype
from bitdial.serving.protocol.encoding import MOST_MEMBERS
from bitdial.serving.protocol.jsontext import parse_json
from bitdial.serving.protocol.response import answer_parameters, plain_json
from bitdial.serving.worker.info import ModelInfo, TensorInfo

IMAGE = TensorInfo("x", "float32", (-1, 3, 4))
WORDS = TensorInfo("words", "int64", (-1, 5))
FOLDED = TensorInfo("windows", "float32", (-1, 2), 3)
OUT = (TensorInfo("y", "float32", (-1, 10)), TensorInfo("z", "float32", (-1,)))
READER = RequestReader([IMAGE], OUT, 8)


def tensor(array: np.ndarray[Any, Any], name: str = "x", data: Any = None, **changes: Any) -> dict[str, Any]:
    kind = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
    entry = {"name": name, "shape": list(array.shape), "datatype": kind}
    if data is None:
        entry["parameters"] = {"binary_data_size": array.nbytes}
    else:
        entry["data"] = data
    return {**entry, **changes}


def binary(request: dict[str, Any], *arrays: np.ndarray[Any, Any]) -> tuple[bytes, int]:
    header = json.dumps(request).encode()
    return header + b"".join(a.tobytes() for a in arrays), len(header)


def images(n: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).standard_normal((n, 3, 4), dtype=np.float32)


def test_binary_json_and_mixed_inputs_give_the_same_arrays() -> None:
    x, w = images(2), np.arange(10, dtype=np.int64).reshape(2, 5)
    reader = RequestReader([IMAGE, WORDS], OUT, 8)
    forms = [
        (binary({"inputs": [tensor(x), tensor(w, "words")]}, x, w)),
        (binary({"inputs": [tensor(w, "words"), tensor(x)]}, w, x)),  # order is the sender's
        (binary({"inputs": [tensor(x), tensor(w, "words", w.ravel().tolist())]}, x)),
        (binary({"inputs": [tensor(x, data=x.tolist()), tensor(w, "words")]}, w)),
        (json.dumps({"inputs": [tensor(x, data=x.ravel().tolist()), tensor(w, "words", w.tolist())]}).encode(), None),
    ]
    for body, length in forms:
        request = reader.read(body, length)
        assert request.samples == 2
        assert [a.dtype.name for a in request.inputs] == ["float32", "int64"]
        np.testing.assert_array_equal(request.inputs[0], x)
        np.testing.assert_array_equal(request.inputs[1], w)


def test_binary_inputs_are_views_of_the_body() -> None:
    x = images(3)
    body, length = binary({"inputs": [tensor(x)]}, x)
    array = READER.read(body, length).inputs[0]
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_the_batch_axis_may_hold_several_entries_per_image() -> None:
    reader = RequestReader([FOLDED], OUT, 4)
    x = np.zeros((6, 2), np.float32)
    assert reader.read(*binary({"inputs": [tensor(x, "windows")]}, x)).samples == 2
    with pytest.raises(BadRequest, match=r"takes \[3N, 2\]"):
        y = np.zeros((5, 2), np.float32)
        reader.read(*binary({"inputs": [tensor(y, "windows")]}, y))


def test_parameters_and_requested_outputs() -> None:
    x = images(1)

    def read(parameters: dict[str, Any], outputs: Any = None) -> Any:
        request = {"id": "a7", "inputs": [tensor(x)], "parameters": parameters}
        return READER.read(*binary(request if outputs is None else {**request, "outputs": outputs}, x))

    plain = read({})
    assert (plain.id, plain.slo, plain.max_ratio, plain.timeout) == ("a7", None, None, None)
    assert plain.outputs == [(0, False), (1, False)]
    full = read({"slo_ms": 50, "max_ratio": 0.25, "timeout": 30_000, "binary_data_output": True, "priority": 1})
    assert (full.slo, full.max_ratio, full.timeout) == (0.05, 0.25, 0.03)
    assert full.outputs == [(0, True), (1, True)]
    assert read({"timeout": 0}).timeout is None
    assert read({}, [{"name": "z"}]).outputs == [(1, False)]
    mixed = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    assert read({}, mixed).outputs == [(1, True), (0, False)]
    assert read({"binary_data_output": True}, [{"name": "y", "parameters": {"binary_data": False}}]).outputs == [
        (0, False)
    ]


BAD: list[tuple[str, Any, str]] = [
    ("no object", [1], "JSON object"),
    ("no inputs", {}, "'inputs'"),
    ("inputs no list", {"inputs": {}}, "'inputs'"),
    ("entry no object", {"inputs": [3]}, "must be an object"),
    ("too many", {"inputs": [tensor(images(1))] * 2}, "'inputs'"),
    ("unknown name", {"inputs": [tensor(images(1), "w")]}, "no input 'w'"),
    ("name no text", {"inputs": [tensor(images(1), name=[])]}, "no input"),  # type: ignore[arg-type]
    ("datatype", {"inputs": [tensor(images(1), datatype="FP16")]}, "takes FP32"),
    ("unknown datatype", {"inputs": [tensor(images(1), datatype="FLOAT")]}, "known types"),
    ("rank", {"inputs": [tensor(images(1), shape=[3, 4])]}, r"takes \[N, 3, 4\]"),
    ("size", {"inputs": [tensor(images(1), shape=[1, 3, 5])]}, "has shape"),
    ("no images", {"inputs": [tensor(images(1), shape=[0, 3, 4])]}, "at least 1"),
    ("negative", {"inputs": [tensor(images(1), shape=[-1, 3, 4])]}, "has shape"),
    ("true as a size", {"inputs": [tensor(images(1), shape=[True, 3, 4])]}, "has shape"),
    ("huge", {"inputs": [tensor(images(1), shape=[10**30, 3, 4])]}, "at most 8"),
    ("too many images", {"inputs": [tensor(images(1), shape=[9, 3, 4])]}, "at most 8"),
    ("binary size", {"inputs": [tensor(images(1), parameters={"binary_data_size": 4})]}, "binary_data_size"),
    ("binary size is text", {"inputs": [tensor(images(1), parameters={"binary_data_size": "48"})]}, "binary_data_size"),
    ("both", {"inputs": [tensor(images(1), data=[1.0] * 12, parameters={"binary_data_size": 48})]}, "both"),
    ("parameters", {"inputs": [tensor(images(1), parameters=[])]}, "must be an object"),
    ("memory", {"inputs": [tensor(images(1), parameters={"shared_memory_region": "r"})]}, "not offered"),
    ("id", {"id": 3, "inputs": [tensor(images(1))]}, "'id'"),
    ("slo", {"inputs": [tensor(images(1))], "parameters": {"slo_ms": 0}}, "slo_ms"),
    ("slo text", {"inputs": [tensor(images(1))], "parameters": {"slo_ms": "50"}}, "slo_ms"),
    ("slo true", {"inputs": [tensor(images(1))], "parameters": {"slo_ms": True}}, "slo_ms"),
    ("slo huge", {"inputs": [tensor(images(1))], "parameters": {"slo_ms": 10**400}}, "slo_ms"),
    ("ratio", {"inputs": [tensor(images(1))], "parameters": {"max_ratio": 1.5}}, "max_ratio"),
    ("ratio below", {"inputs": [tensor(images(1))], "parameters": {"max_ratio": -0.1}}, "max_ratio"),
    ("timeout", {"inputs": [tensor(images(1))], "parameters": {"timeout": -1}}, "timeout"),
    ("flag", {"inputs": [tensor(images(1))], "parameters": {"binary_data_output": 1}}, "true or false"),
    ("output", {"inputs": [tensor(images(1))], "outputs": [{"name": "q"}]}, "no output 'q'"),
    ("output twice", {"inputs": [tensor(images(1))], "outputs": [{"name": "y"}] * 2}, "twice"),
    ("outputs", {"inputs": [tensor(images(1))], "outputs": "y"}, "must be a list"),
    ("classes", {"inputs": [tensor(images(1))], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "offered"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "expected"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_wrong_is_named(request_: Any, expected: str) -> None:
    body, length = binary(request_, images(1))
    with pytest.raises(BadRequest, match=expected):
        READER.read(body, length)


@pytest.mark.parametrize("length", [0, 5, 10**9])
def test_a_wrong_header_length(length: int) -> None:
    body, _ = binary({"inputs": [tensor(images(1))]}, images(1))
    with pytest.raises(BadRequest):
        READER.read(body, length)


def test_data_missing_or_left_over() -> None:
    x = images(2)
    body, length = binary({"inputs": [tensor(x)]}, x)
    with pytest.raises(BadRequest, match="1 bytes too early"):
        READER.read(body[:-1], length)
    with pytest.raises(BadRequest, match="3 bytes follow"):
        READER.read(body + b"abc", length)


NUMBERS = [0.5] * 12
WRONG_DATA: list[Any] = [
    None, 3, "abc", {}, [], NUMBERS[:-1], [*NUMBERS, 1.0], [*NUMBERS[:-1], "1"], [*NUMBERS[:-1], None], [*NUMBERS[:-1], True],
    [*NUMBERS[:-1], [0.5]], [[0.5] * 12], [[[0.5] * 4] * 3, [[0.5] * 4] * 3], [[[0.5] * 4, [0.5] * 4, [0.5] * 3]],
    [[[0.5] * 4, [0.5] * 4, "abcd"]], [[[0.5] * 4, [0.5] * 4, {"a": 1}]], [[[[0.5]] * 4] * 3],
]  # fmt: skip


@pytest.mark.parametrize("data", WRONG_DATA, ids=[str(i) for i in range(len(WRONG_DATA))])
def test_wrong_json_data(data: Any) -> None:
    request = {"inputs": [{"name": "x", "shape": [1, 3, 4], "datatype": "FP32", "data": data}]}
    with pytest.raises(BadRequest):
        READER.read(json.dumps(request).encode())


def test_integers_beyond_their_type() -> None:
    reader = RequestReader([WORDS], OUT, 8)
    for wrong in (2**63, -(2**63) - 1, 10**40, 1.5):
        request = {"inputs": [{"name": "words", "shape": [1, 5], "datatype": "INT64", "data": [0, 0, 0, 0, wrong]}]}
        with pytest.raises(BadRequest):
            reader.read(json.dumps(request).encode())
    top = {"inputs": [{"name": "words", "shape": [1, 5], "datatype": "INT64", "data": [0, 0, 0, 0, 2**63 - 1]}]}
    assert reader.read(json.dumps(top).encode()).inputs[0][0, 4] == 2**63 - 1


def test_numbers_beyond_float32_become_infinite_and_are_refused_later() -> None:
    request = {"inputs": [{"name": "x", "shape": [1, 3, 4], "datatype": "FP32", "data": [1e39] + [0.0] * 11}]}
    assert np.isinf(READER.read(json.dumps(request).encode()).inputs[0][0, 0, 0])
    with pytest.raises(BadRequest):
        READER.read(json.dumps(request).replace("1e+39", "1" + "0" * 400).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[Infinity]",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        b"[1,]",
        b'"\\ud800',
    ],
)
def test_hostile_json_is_a_bad_request(text: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(text)


def test_an_amount_of_brackets_that_only_an_attack_has() -> None:
    with pytest.raises(BadRequest, match="lists and objects"):
        parse_json(b"[" + b"[]," * 200_000 + b"1]")
    nested = np.zeros((2000, 60)).tolist()
    assert parse_json(json.dumps(nested).encode()) == nested


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 320)))
@settings(max_examples=200)
def test_any_bytes_are_read_or_refused(body: bytes, length: int | None) -> None:
    with pytest.raises(ServingError):
        READER.read(body, length)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


@given(
    st.sampled_from(["id", "inputs", "outputs", "parameters"]),
    JSON,
    st.sampled_from([None, "name", "shape", "datatype", "data"]),
)
@settings(max_examples=300)
def test_a_request_with_one_part_replaced_by_anything_is_read_or_refused(
    key: str, value: Any, inner: str | None
) -> None:
    request: dict[str, Any] = {"inputs": [tensor(images(1), data=images(1).tolist())], "parameters": {}, "outputs": []}
    if inner is not None:
        request["inputs"][0][inner] = value
    else:
        request[key] = value
    try:
        result = READER.read(json.dumps(request).encode())
    except BadRequest as error:
        assert 0 < len(str(error)) < 2000
    else:
        assert result.samples == 1 and result.inputs[0].shape == (1, 3, 4)


# ---- compression -----------------------------------------------------------------------------------------------------------


def test_compressed_bodies() -> None:
    data = b"bitdial " * 1000
    for name, packed in (
        ("gzip", gzip.compress(data)),
        ("deflate", zlib.compress(data)),
        ("", data),
        ("Identity", data),
    ):
        assert decode_body(packed, name, len(data)) == data
    with pytest.raises(TooLarge):
        decode_body(gzip.compress(data), "gzip", len(data) - 1)
    for broken in (b"", b"abc", gzip.compress(data)[:-5], gzip.compress(data) + b"x", zlib.compress(data)):
        with pytest.raises(BadRequest):
            decode_body(broken, "gzip", 1 << 20)
    with pytest.raises(UnsupportedEncoding):
        decode_body(data, "br", 1 << 20)


def test_gzip_of_several_members() -> None:
    """As pigz, bgzip and `cat a.gz b.gz` write it."""
    data = np.random.default_rng(0).bytes(100_000)  # longer than is unpacked at a time
    several = b"".join(gzip.compress(part) for part in (data[:7], b"", data[7:60_000], data[60_000:]))
    assert decode_body(several, "gzip", len(data)) == data
    with pytest.raises(TooLarge):
        decode_body(several, "gzip", len(data) - 1)
    for wrong, says in (
        (several[:-5], "end too early"),
        (several + gzip.compress(b"x")[:4], "end too early"),
        (several + b"rubbish", "7 bytes follow"),
        (several + bytes(100), "100 bytes follow"),
        (gzip.compress(b"") * (MOST_MEMBERS + 1), "members"),
    ):
        with pytest.raises(BadRequest, match=says):
            decode_body(wrong, "gzip", len(data))
    with pytest.raises(BadRequest, match="bytes follow the body's deflate data"):
        decode_body(zlib.compress(data) * 2, "deflate", 1 << 20)


def test_a_bomb_is_not_unpacked() -> None:
    import tracemalloc

    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(TooLarge):
        decode_body(bomb, "gzip", 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# ---- answers ---------------------------------------------------------------------------------------------------------------


def outputs(n: int = 2) -> list[np.ndarray[Any, Any]]:
    return [np.arange(10 * n, dtype=np.float32).reshape(n, 10) / 7, np.arange(n, dtype=np.float32)]


def test_an_answer_in_json() -> None:
    body, length = infer_response(
        "m", ["y", "z"], outputs(), [(0, False), (1, False)], 'i"d', answer_parameters(0.5, 0.001, 0.002, 7)
    )
    assert length is None
    document = json.loads(body)
    assert document["model_name"] == "m" and document["model_version"] == "1" and document["id"] == 'i"d'
    assert document["parameters"] == {"ratio": 0.5, "queue_ms": 1.0, "compute_ms": 2.0, "batch": 7}
    first, second = document["outputs"]
    assert (first["name"], first["datatype"], first["shape"]) == ("y", "FP32", [2, 10])
    np.testing.assert_array_equal(np.array(first["data"], np.float32), outputs()[0].ravel())
    assert second["data"] == [0.0, 1.0]


def test_an_answer_with_binary_tensors_and_in_the_order_asked_for() -> None:
    body, length = infer_response("m", ["y", "z"], outputs(), [(1, True), (0, True)])
    assert length is not None
    document = json.loads(body[:length])
    assert "id" not in document
    assert [o["name"] for o in document["outputs"]] == ["z", "y"]
    assert [o["parameters"]["binary_data_size"] for o in document["outputs"]] == [8, 80]
    np.testing.assert_array_equal(np.frombuffer(body, np.float32, 20, length + 8).reshape(2, 10), outputs()[0])
    body, length = infer_response("m", ["y", "z"], outputs(), [(1, False), (0, True)])
    assert json.loads(body[:length])["outputs"][0]["data"] == [0.0, 1.0]


def test_json_cannot_say_nan() -> None:
    bad = [np.array([np.nan], np.float32)]
    with pytest.raises(ComputeFailed, match="binary"):
        infer_response("m", ["y"], bad, [(0, False)])
    assert infer_response("m", ["y"], bad, [(0, True)])[1] is not None
    assert plain_json({"a": [np.float32(1), float("inf"), (2,)]}) == {"a": [1.0, None, [2]]}
    assert json.loads(error_body('say "no"')) == {"error": 'say "no"'}


def test_datatypes() -> None:
    for name in DATATYPES:
        assert datatype_of(numpy_dtype(name)) == name
    with pytest.raises(ConfigError):
        datatype_of(np.complex64)


def test_metadata_documents() -> None:
    info = ModelInfo("f", (IMAGE,), OUT, (0.0, 1.0), (0.9, None), {}, [], "abc")
    document = model_metadata("m", info, 0.05)
    assert document["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 4]}]
    assert document["parameters"]["accuracy"] == [0.9, None] and document["versions"] == ["1"]
    config = model_config("m", info, 32, 0.002)
    assert config["max_batch_size"] == 32 and config["dynamic_batching"]["max_queue_delay_microseconds"] == 2000
    assert config["input"][0] == {"name": "x", "data_type": "TYPE_FP32", "dims": [3, 4]}
    json.dumps([document, config])


def test_the_largest_body_is_enough_for_the_largest_request_as_json() -> None:
    x = -np.full((8, 3, 4), 1.2345678901234567e-30, np.float64)
    request = {"inputs": [{"name": "x", "shape": [8, 3, 4], "datatype": "FP32", "data": x.tolist()}]}
    body = json.dumps(request).encode()
    assert len(body) <= READER.largest_body
    assert READER.read(body).samples == 8
