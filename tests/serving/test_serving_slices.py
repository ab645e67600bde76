"""Large JSON, read and written in slices: the same answers as in one go, and the event loop's turns go to others in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="THE SERVER IS NOT TESTED: fastapi is not installed")
pytest.importorskip("uvloop", reason="THE SERVER IS NOT TESTED: uvloop is not installed")

from served import SHAPE, Running, http, message, serving, status, write_model, write_table

from bitdial.serving.errors import BadRequest
from bitdial.serving.protocol import RequestReader, infer_response, request, slices
from bitdial.serving.protocol.response import infer_response_steps
from bitdial.serving.server.turns import Turns
from bitdial.serving.worker.info import TensorInfo

OUT = [TensorInfo("y", "float32", (-1, 2))]
READER = RequestReader(
    [TensorInfo("x", "float32", (-1, 2, 3)), TensorInfo("w", "int8", (4,)), TensorInfo("b", "bool", (-1, 2))], OUT, 8
)


def tensor(name: str, datatype: str, data: Any, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def outcome(body: bytes) -> Any:
    """The arrays of a request, or what is wrong with it."""
    try:
        found = READER.read(body)
    except BadRequest as error:
        return str(error).partition(": line")[0]
    return [(array.dtype, array.shape, array.tolist()) for array in found.inputs], found.samples, found.id


@st.composite
def bodies(draw: Any) -> bytes:
    """Requests as text: most are sound, others have a mistake in them."""
    images = draw(st.integers(1, 4))
    values = st.floats(-1e3, 1e3, width=32) | st.integers(-9, 9)
    x = np.array(draw(st.lists(values, min_size=6 * images, max_size=6 * images)), object)
    nested = draw(st.booleans())
    content = {
        "id": draw(st.sampled_from(["", "a", '"data":[1,2', 'data":[', "x\\"])),
        "inputs": [
            tensor("x", "FP32", (x.reshape(images, 2, 3) if nested else x).tolist(), [images, 2, 3]),
            tensor("w", "INT8", draw(st.lists(st.integers(-128, 127), min_size=4, max_size=4)), [4]),
            tensor("b", "BOOL", np.ones((images, 2), bool).tolist(), [images, 2]),
        ],
    }
    text = json.dumps(content, indent=draw(st.sampled_from([None, 1])))
    if draw(st.booleans()):
        at = draw(st.integers(text.index("inputs"), len(text) - 1))
        text = (
            text[:at] + draw(st.sampled_from(["", "[", "]", ",", "1", " ", "e", '"', "-", "NaN", "}"])) + text[at + 1 :]
        )
    return text.encode()


@settings(max_examples=120, deadline=None)
@given(body=bodies(), step=st.integers(120, 300))
def test_slices_read_what_the_whole_says(body: bytes, step: int) -> None:
    whole = outcome(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "SMALL", 0)
        patch.setattr(slices, "STEP", step)
        sliced = outcome(body)
    if isinstance(whole, str):
        assert isinstance(sliced, str), whole
    else:
        assert sliced == whole


@pytest.mark.parametrize(
    "data",
    ["[1,2,3,4,5]", "[1,2,3,4,5,6,7]", "[1,,3,4,5,6]", "[1,2,3,4,5,]", "[,2,3,4,5,6]", "[1 2,3,4,5,6]", "[[1,2,3],[4,5,6]]",
     "[[[1,2,3],[4,5,6]]", "[[[1,2,3],[4,5,6]]]]", "[[[1,2],[3,4],[5,6]]]", "[[[1,2,3][,4,5,6]]]", "[[[1,2,3[,4,5,6]]]",
     "[1[2,3,4,5,6]]", "[[[1,2,3],[4,5],6]]]", "[1,2,3,4,5,6][]", "[NaN,2,3,4,5,6]", "[true,2,3,4,5,6]", "[1,2,3,4,5,0x6]",
     "[1,2,3,4,5,1e999999999999]", "[[],2,3,4,5,6]", "[1,2,3,\x0b4,5,6]", "[1,2,3,\xff4,5,6]", "NaN",
     "[" + "9" * 5000 + ",2,3,4,5,6]", '[1,2,"3",4,5,6]', "[1,2,{},4,5,6]", "[1,2,3,4,5,6],[1]"],
)  # fmt: skip
def test_wrong_lists_are_refused(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    reader = RequestReader([TensorInfo("x", "float32", (-1, 2, 3))], OUT, 8)
    good = '{"inputs": [{"name": "x", "shape": [1,2,3], "datatype": "FP32", "data": [[[1,2,3], [ 4,5,6 ] ]]}]}'
    bad = good.replace("[[[1,2,3], [ 4,5,6 ] ]]", data).encode("latin-1")
    monkeypatch.setattr(request, "SMALL", 0)
    for step in (8, 1 << 15):
        monkeypatch.setattr(slices, "STEP", step)
        assert reader.read(good.encode()).inputs[0].tolist() == [[[1, 2, 3], [4, 5, 6]]]
        if "e999" not in data:  # infinite: the worker refuses it
            with pytest.raises(BadRequest):
                reader.read(bad)


def numbers(count: int) -> str:
    return f"[{'0.25,' * (count - 1)}0.25]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"x"', '"y"'), "no input 'y'"),
        (("[4,60000]", "[4,50000]"), "shape"),
        (("FP32", "INT8"), "datatype"),
        (('"inputs"', '"id": 3, "inputs"'), "'id'"),
        (("}]}", '}], "outputs": [{"name": "z"}]}'), "no output"),
        (("}]}", '}], "data": "' + "z" * 70_000 + '"}'), "beside the lists of numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_number_is_read(change: tuple[str, str], words: str) -> None:
    reader = RequestReader([TensorInfo("x", "float32", (-1, 60_000))], OUT, 8)
    text = f'{{"inputs": [{{"name": "x", "shape": [4,60000], "datatype": "FP32", "data": {numbers(240_000)}}}]}}'
    next(reader.steps(text.encode()))  # sound: begins to read
    with pytest.raises(BadRequest, match=words):
        next(reader.steps(text.replace(*change).encode()))


def test_no_step_holds_more_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(json.JSONDecoder):
        def decode(self, s: str, *rest: Any) -> Any:
            sizes.append(len(s))
            return super().decode(s, *rest)

    monkeypatch.setattr(slices, "DECODER", Watched())
    reader = RequestReader([TensorInfo("x", "float32", (-1, 60_000))], OUT, 8)
    text = f'{{"inputs": [{{"name": "x", "shape": [8,60000], "datatype": "FP32", "data": {numbers(480_000)}}}]}}'
    assert (reader.read(text.encode()).inputs[0] == 0.25).all()
    assert len(sizes) > len(text) // slices.STEP and max(sizes) <= slices.STEP + 2


def test_answers_are_written_in_steps() -> None:
    y = np.random.default_rng(0).standard_normal((30, 500), dtype=np.float32)
    steps = infer_response_steps("m", ["y"], [y], [(0, False)])
    assert sum(1 for _ in steps) == y.size // slices.NUMBERS
    body, _ = infer_response("m", ["y"], [y], [(0, False)])
    assert json.loads(body)["outputs"][0]["data"] == y.ravel().tolist()


def test_a_turn_holds_one_step_of_one_work() -> None:
    turn, log = 0, []

    def work(name: str, steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield
            log.append((turn, name))
        return name  # type: ignore[return-value]

    async def main() -> list[str]:
        nonlocal turn
        turns = Turns()
        jobs = [asyncio.ensure_future(turns.run(work(n, k))) for n, k in (("a", 9), ("b", 3), ("c", 3), ("d", 0))]  # type: ignore[arg-type]
        while not all(job.done() for job in jobs):
            turn += 1
            await asyncio.sleep(0)
        return [job.result() for job in jobs]  # type: ignore[misc]

    assert asyncio.run(main()) == ["a", "b", "c", "d"]
    assert len({at for at, _ in log}) == len(log) == 15
    assert [name for _, name in log[:9]].count("c") == 3  # nobody waits for a longer work's end


# ---- a server --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("slices")
    models, tables = {"m": write_model(folder / "m", shape=[60_000])}, {"m": write_table(folder / "t")}
    with serving(models, tables, server={"max_json_mb": 8}, slo_ms=60_000, policy="fixed:0") as running:
        yield running


def body(images: int, name: str = "x") -> bytes:
    text = f'{{"name": "{name}", "shape": [{images},60000], "datatype": "FP32", "data": {numbers(60_000 * images)}}}'
    return f'{{"inputs": [{text}]}}'.encode()


async def ask(running: Running, path: str, content: bytes | None = None) -> int:
    """A request to the application itself, on the server's loop; its status."""
    told: list[dict[str, Any]] = []
    asked: list[bool] = []

    async def receive() -> dict[str, Any]:
        if asked:  # the client stays
            await asyncio.Event().wait()
        asked.append(True)
        return {"type": "http.request", "body": content or b"", "more_body": False}

    async def send(part: Any) -> None:
        told.append(part)

    method = "GET" if content is None else "POST"
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
             "root_path": "", "scheme": "http", "http_version": "1.1", "server": None, "client": None}  # fmt: skip
    await running.server.application(scope, receive, send)
    return int(told[0]["status"])


def test_health_answers_while_large_json_is_read(server: Running) -> None:
    content = body(16)

    async def main() -> tuple[int, int]:
        large = asyncio.ensure_future(ask(server, "/v2/models/m/infer", content))
        healthy = 0
        while not large.done():
            await asyncio.sleep(0)  # a request arrives
            healthy += await ask(server, "/v2/health/live") == 200
        return large.result(), healthy

    answered, healthy = server.do(main())
    assert answered == 200
    assert healthy >= len(content) // slices.STEP  # one in every turn; a handful if the JSON were read in one go


def test_json_has_a_limit_of_its_own(server: Running, tmp_path: Path) -> None:
    def post(content: bytes, headers: str = "") -> bytes:
        head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
        return head.encode() + content

    assert status(http(server.port, post(body(4)))) == 200
    told = http(server.port, post(b" " * ((8 << 20) + 1)))
    assert status(told) == 413 and "--max-json-mb" in message(told) and "binary" in message(told)
    head = f"Inference-Header-Content-Length: {(8 << 20) + 1}\r\n"
    told = http(server.port, post(b" " * ((8 << 20) + 1), head))
    assert status(told) == 413 and "--max-json-mb" in message(told)
    binary = np.ones((16, 60_000), np.float32).tobytes() * 3  # more than that in binary is taken
    part = json.dumps(
        {"inputs": [{**tensor("x", "FP32", None, [16, 60_000]), "parameters": {"binary_data_size": 1}}]}
    ).encode()
    told = http(server.port, post(part + binary, f"Inference-Header-Content-Length: {len(part)}\r\n"))
    assert len(binary) > 8 << 20 and status(told) == 400 and "binary_data_size" in message(told)

    application = server.server.application
    standard = type(application)(application.models, None)
    assert standard.json_limit(server.model()) == 4 << 20 < standard.body_limit(server.model())
    assert 24 * np.prod(SHAPE) < 4 << 20
