"""Workers without processes: messages, batches of several requests, shared memory, errors by name, the plan of measuring."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdial import errors
from bitdial.errors import ArtifactError, BitdialError, ConfigError, EngineError, InputError
from bitdial.serving.worker import calibration
from bitdial.serving.worker.base import Result, WorkerOptions
from bitdial.serving.worker.batching import count_samples, fill, join, split
from bitdial.serving.worker.calibration import batch_sizes, make_table, measure_table, random_request
from bitdial.serving.worker.errors import SignatureError, WorkerCrash, error_from_json, error_to_json
from bitdial.serving.worker.faults import Fault
from bitdial.serving.worker.file import ModelFile, anonymous_file, read_descriptor
from bitdial.serving.worker.frames import AsyncFrames, BlockingFrames, Decoder, FrameError, encode
from bitdial.serving.worker.info import ModelInfo, TensorInfo
from bitdial.serving.worker.memory import BatchMemory

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_info(
    inputs: Sequence[TensorInfo] = (TensorInfo("x", "float32", (-1, 3, 4)),),
    outputs: Sequence[TensorInfo] = (TensorInfo("y", "float32", (-1, 10)),),
    ratios: tuple[float, ...] = RATIOS,
    digest: str = "00",
) -> ModelInfo:
    accuracy = (0.9, None, *[0.8] * (len(ratios) - 2)) if len(ratios) > 1 else (0.9,)
    layer = {"name": "conv", "kind": "conv", "macs": 7, "eligible": True, "low": [0.0] * len(ratios)}
    return ModelInfo(
        "m", tuple(inputs), tuple(outputs), ratios, accuracy, {"name": "cpu", "threads": 1}, [layer], digest
    )


# ---- messages --------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
messages = st.dictionaries(st.text(max_size=8), json_values, max_size=5)


@given(st.lists(messages, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_frames_survive_any_cutting(sent: list[dict[str, Any]], pieces: list[int]) -> None:
    data = b"".join(encode(m) for m in sent)
    decoder, found, at, turn = Decoder(), [], 0, 0
    while at < len(data):
        size = pieces[turn % len(pieces)]
        found += decoder.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert found == sent


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x03\0\0\0{{{", b"\x02\0\0\0[]"])
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        Decoder().feed(data)


def test_long_messages_pass_a_full_socket() -> None:
    """More than the socket's buffer in both directions, while the other side is slow to read."""

    async def go() -> None:
        ours, theirs = socket.socketpair()
        answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        closed: asyncio.Queue[str] = asyncio.Queue()
        frames = AsyncFrames(ours, answers.put_nowait, closed.put_nowait)

        def echo() -> None:
            time.sleep(0.05)
            other = BlockingFrames(theirs)
            for _ in range(3):
                message = other.receive()
                assert message is not None
                other.send(message)
            theirs.close()

        thread = threading.Thread(target=echo)
        thread.start()
        sent = [{"text": "a" * 3_000_000}, {"n": 1}, {"text": "b" * 500_000}]
        for message in sent:
            frames.send(message)
        assert [await asyncio.wait_for(answers.get(), 120) for _ in sent] == sent
        assert await asyncio.wait_for(closed.get(), 120) == ""
        thread.join()
        frames.send({"n": 2})  # to nobody: no exception, and no second word of the end
        await asyncio.sleep(0.01)
        assert closed.empty()

    asyncio.run(go())


# ---- batches ---------------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[ModelInfo, list[list[np.ndarray[Any, Any]]], list[int]]:
    """A model with inputs whose batch lies on any axis, and requests for it."""

    def tensors(prefix: str) -> list[TensorInfo]:
        result = []
        for i in range(draw(st.integers(1, 3))):
            rest = draw(st.lists(st.integers(1, 3), max_size=3))
            axis = draw(st.integers(0, len(rest)))
            dtype = draw(st.sampled_from(["float32", "int64", "bool", "float64", "uint8"]))
            result.append(TensorInfo(f"{prefix}{i}", dtype, (*rest[:axis], -1, *rest[axis:]), draw(st.integers(1, 3))))
        return result

    info = make_info(tensors("x"), tensors("y"))
    samples = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    requests = [[rng.integers(0, 2, t.of(n)).astype(t.dtype) for t in info.inputs] for n in samples]
    return info, requests, samples


@given(batches(), st.data())
def test_requests_are_joined_and_taken_apart_again(batch: Any, data: st.DataObject) -> None:
    info, requests, samples = batch
    assert count_samples(info, requests, sum(samples)) == samples
    joined = join(info, requests)
    descriptor = anonymous_file("test")
    memory = BatchMemory(descriptor, info, sum(samples), grow=True)
    os.close(descriptor)
    views = memory.inputs(sum(samples))
    fill(info, views, requests)
    for tensor, a, b in zip(info.inputs, joined, views, strict=True):
        assert a.shape == b.shape == tensor.of(sum(samples)) and a.dtype == b.dtype == tensor.dtype
        assert np.array_equal(a, b)
    # as if the model gave its inputs back, those of bad requests left out
    checked = data.draw(st.lists(st.sampled_from(["", "bad"]), min_size=len(samples), max_size=len(samples)))
    good = [r for r, problem in zip(requests, checked, strict=True) if not problem]
    same = make_info(info.inputs, info.inputs)
    back = split(same, join(same, good) if good else [], samples, checked)
    for request, answer, problem in zip(requests, back, checked, strict=True):
        if problem:
            assert answer == []
        else:
            assert all(np.array_equal(a, b) and b.flags.c_contiguous for a, b in zip(request, answer, strict=True))
    del views
    memory.close()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ([], "takes 1 input"),
        ([np.zeros((1, 3, 4), np.float64)], "is float64"),
        ([np.zeros((1, 3, 4), ">f4")], "is >f4"),
        ([np.zeros((3, 4), np.float32)], r"shape \[3, 4\]"),
        ([np.zeros((1, 1, 4), np.float32)], r"the model takes float32\[N, 3, 4\]"),  # would broadcast
        ([np.zeros((0, 3, 4), np.float32)], "shape"),
        ([np.zeros((9, 3, 4), np.float32)], "1 to 8 samples, got 9"),
    ],
)
def test_wrong_requests_are_named(arrays: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        count_samples(make_info(), [arrays], 8)
    with pytest.raises(InputError, match=says):
        count_samples(make_info(), [[np.zeros((1, 3, 4), np.float32)], arrays] if len(arrays) != 1 else [arrays], 8)


def test_inputs_must_hold_the_same_number_of_samples() -> None:
    info = make_info([TensorInfo("a", "float32", (-1, 2)), TensorInfo("b", "float32", (3, -1), 2)])
    assert count_samples(info, [[np.zeros((2, 2), np.float32), np.zeros((3, 4), np.float32)]], 8) == [2]
    with pytest.raises(InputError, match="holds 1 samples, input 'a' 2"):
        count_samples(info, [[np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32)]], 8)
    with pytest.raises(InputError, match=r"shape \[3, 3\]"):
        count_samples(info, [[np.zeros((2, 2), np.float32), np.zeros((3, 3), np.float32)]], 8)


def test_shared_memory_cannot_be_shrunk_or_mapped_for_another_model() -> None:
    descriptor = anonymous_file("test")
    try:
        memory = BatchMemory(descriptor, make_info(), 4, grow=True)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 10)
        with pytest.raises(ValueError, match="expected"):
            BatchMemory(descriptor, make_info(), 400)
        memory.close()
    finally:
        os.close(descriptor)


# ---- what crosses ----------------------------------------------------------------------------------------------------------


def test_model_info_crosses_as_json() -> None:
    info = make_info()
    assert ModelInfo.from_json(json.loads(json.dumps(info.as_json()))) == info
    assert info.signature_difference(make_info(digest="ff", ratios=(0.0, 1.0))) == ""
    other = make_info(outputs=[TensorInfo("y", "float32", (-1, 7))])
    assert info.signature_difference(other) == "outputs were y float32[N, 10] and are y float32[N, 7]"


def test_errors_keep_their_class() -> None:
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, BitdialError)]
    for kind in [*kinds, WorkerCrash, SignatureError]:
        back = error_from_json(json.loads(json.dumps(error_to_json(kind("what is wrong")))))
        assert type(back) is kind and str(back) == "what is wrong"

    class Own(ArtifactError):
        pass

    assert type(error_from_json(error_to_json(Own("x")))) is ArtifactError
    strange = error_from_json(error_to_json(KeyError("k")))
    assert type(strange) is EngineError and "KeyError" in str(strange)
    assert type(error_from_json(["SystemExit", "x"])) is EngineError
    assert type(error_from_json({"a": 1})) is EngineError


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_batch": True}, {"patience": 0.0}, {"grace": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WorkerOptions(**options)


def test_no_fault_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDIAL_TEST_FAULT", raising=False)
    fault = Fault()
    for _ in range(100):
        fault.at_load(), fault.at_batch(), fault.at_end()


def test_a_model_file_stays_what_it_was_whatever_happens_to_it(tmp_path: Path) -> None:
    path = tmp_path / ("m" * 3 + "模" * 80 + ".bitdial")  # as long as names may be: longer than the system's for memory
    path.write_bytes(b"old")
    file = ModelFile(path)
    path.write_bytes(b"overwritten in place")
    assert read_descriptor(file.fileno(), str(path)) == b"old"
    (tmp_path / "new").write_bytes(b"newer")
    os.replace(tmp_path / "new", path)
    assert read_descriptor(file.fileno(), str(path)) == b"old" == read_descriptor(file.fileno(), str(path))
    with pytest.raises(OSError):
        os.pwrite(file.fileno(), b"x", 0)
    again = ModelFile(f"/proc/self/fd/{file.fileno()}")  # in such memory already: shared, not copied
    assert os.fstat(again.fileno()).st_ino == os.fstat(file.fileno()).st_ino
    again.close()
    file.close()
    file.close()
    os.mkfifo(tmp_path / "pipe")
    held = os.listdir("/proc/self/fd")
    for wrong in (tmp_path / "none", tmp_path, tmp_path / "pipe", "a\0b"):
        with pytest.raises(ArtifactError):
            ModelFile(wrong)
    assert os.listdir("/proc/self/fd") == held


# ---- measuring -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds]: the clock that measuring looks at."""
    now = [100.0]
    monkeypatch.setattr(calibration, "clock", lambda: now[0])
    return now


class PacedWorker:
    """Takes as long as `cost` says on the clock given, and counts."""

    on_lost = None
    alive = True

    def __init__(
        self,
        clock: list[float],
        cost: Callable[[int, int], float],
        ratios: tuple[float, ...] = RATIOS,
        digest: str = "00",
    ) -> None:
        self.info, self.clock, self.cost = make_info(ratios=ratios, digest=digest), clock, cost
        self.ran: list[tuple[int, int]] = []

    async def start(self) -> ModelInfo:
        return self.info

    async def stop(self) -> None: ...

    async def run(self, requests: Sequence[Sequence[Any]], index: int, pace: float = 0.0) -> Result:
        samples = len(requests[0][0])
        self.ran.append((index, samples))
        self.clock[0] += self.cost(index, samples)
        return Result([[]], index, 0.0, [""])


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])])
def test_batch_sizes_end_with_the_largest(largest: int, sizes: list[int]) -> None:
    assert batch_sizes(largest) == sizes


def test_a_quick_model_is_measured_everywhere(clock: list[float]) -> None:
    worker = PacedWorker(clock, lambda i, n: 2e-4 * (1.0 - 0.1 * i) * (1 + 0.2 * n))
    shares: list[float] = []
    table = asyncio.run(measure_table(worker, 8, lambda s, text: shares.append(s), 0.6, remember=False))
    assert clock[0] <= 100.6
    assert table.batches == (1, 2, 4, 8) and table.ratios == RATIOS and table.accuracy == worker.info.accuracy
    assert table.about["interpolated_cells"] == 0
    for i in range(5):
        for n in table.batches:
            assert worker.ran.count((i, n)) >= 10 and table.latency(i, n) == pytest.approx(worker.cost(i, n))
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_an_expensive_model_is_measured_where_it_counts(clock: list[float]) -> None:
    worker = PacedWorker(clock, lambda i, n: 0.01 * (1.0 - 0.1 * i) * n)
    table = asyncio.run(measure_table(worker, 32, None, 0.5, remember=False))
    assert clock[0] < 100.6
    assert table.batches[0] == 1 and len(table.batches) >= 2 and table.about["interpolated_cells"] > 0
    assert {(0, 1), (4, 1)} <= set(worker.ran) and 4 <= max(n for _, n in worker.ran) < 32
    for i in range(5):
        for n in table.batches:
            assert table.latency(i, n) == pytest.approx(worker.cost(i, n))


@given(
    seconds=st.floats(1e-2, 10.0),
    largest=st.integers(1, 64),
    ratios=st.integers(1, 11),
    image=st.floats(1e-3, 1.0),
    fixed=st.floats(0.0, 0.01),
    gain=st.floats(-0.2, 0.8),
)
def test_measuring_keeps_to_its_time(
    seconds: float, largest: int, ratios: int, image: float, fixed: float, gain: float
) -> None:
    """Apart from what is measured in any case."""
    now = [100.0]
    last = max(ratios - 1, 1)
    worker = PacedWorker(
        now, lambda i, n: fixed + image * n * (1.0 - gain * i / last), tuple(i / last for i in range(ratios))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "clock", lambda: now[0])
        table = asyncio.run(measure_table(worker, largest, None, seconds, remember=False))
    ends = {0, ratios - 1}
    least = sum(3 * worker.cost(i, 1) + (worker.cost(i, 2) if largest > 1 else 0.0) for i in ends)
    assert now[0] - 100.0 <= 1.2 * seconds + least
    assert len(table.batches) >= min(largest, 2)
    for i in range(ratios):
        for n in table.batches:
            assert table.latency(i, n) == pytest.approx(worker.cost(i, n), rel=0.05)


@pytest.mark.parametrize("ratios", [(0.0,), (0.0, 1.0)])
def test_far_too_little_time_still_gives_a_table(clock: list[float], ratios: tuple[float, ...]) -> None:
    worker = PacedWorker(clock, lambda i, n: 0.01 * n, ratios)
    table = asyncio.run(measure_table(worker, 16, None, 1e-3, remember=False))
    assert table.batches == (1, 2)
    assert len(worker.ran) <= 5 * len(ratios)


def test_cells_between_lie_as_at_the_nearest_size() -> None:
    times = {(0, 1): 1.0, (1, 1): 0.9, (4, 1): 0.5, (0, 8): 8.0, (4, 8): 4.0, (2, 4): 3.0}
    table = make_table(make_info(), times)
    assert table.batches == (1, 8)
    assert table.seconds[1] == (0.9, pytest.approx(8.0 - 0.2 * 4.0))
    assert table.seconds[2] == (pytest.approx(0.75), pytest.approx(6.0))  # nothing known: in proportion to the ratio


def test_measured_tables_are_remembered(clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path))
    worker = PacedWorker(clock, lambda i, n: 1e-4 * n)
    first = asyncio.run(measure_table(worker, 2, None, 0.05))
    ran = len(worker.ran)
    assert (
        asyncio.run(measure_table(worker, 2, None, 0.05)) == first and len(worker.ran) == ran + 12
    )  # a check, 6 runs an end
    slower = PacedWorker(clock, lambda i, n: 1.5e-4 * n)  # what was remembered is of a quieter day
    assert asyncio.run(measure_table(slower, 2, None, 0.05)).latency(0, 2) == pytest.approx(3e-4)
    assert asyncio.run(measure_table(worker, 2, None, 0.05)).latency(0, 2) == pytest.approx(2e-4)
    asyncio.run(measure_table(PacedWorker(clock, worker.cost, digest="01"), 2, None, 0.05))  # another model
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text("{")
    asyncio.run(measure_table(worker, 2, None, 0.05))  # damaged: measured again
    assert len(worker.ran) > ran
    monkeypatch.setenv("BITDIAL_CACHE_DIR", "/proc/none")
    asyncio.run(measure_table(worker, 2, None, 0.05))  # nowhere to write: no matter


def test_random_requests_have_the_models_dtypes() -> None:
    info = make_info(
        [TensorInfo("a", "float64", (-1, 2)), TensorInfo("i", "int64", (3, -1), 2), TensorInfo("b", "bool", (-1,))]
    )
    arrays = random_request(info, 5)
    assert count_samples(info, [arrays], 5) == [5]
