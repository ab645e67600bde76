"""The public API: forms of calibration, bad input, the dial, independence of samples, threads, resumption."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitdial
from bitdial import QuantizeConfig, QuantizedModel
from bitdial.errors import (
    BitdialError,
    CalibrationError,
    CaptureError,
    ConfigError,
    EngineError,
    InputError,
    RatioError,
)
from bitdial.pipeline.samples import gather

GREEDY = QuantizeConfig(target="paper", selector="greedy", calibration_images=32, search_images=8, group_size=8)


@pytest.fixture(scope="module")
def images(helpers: Any) -> Tensor:
    data: Tensor = helpers.images(32, seed=5)
    return data


@pytest.fixture(scope="module")
def qm(conv_net: nn.Module, images: Tensor) -> QuantizedModel:
    return bitdial.quantize(conv_net, images, GREEDY, engine="reference")


@pytest.fixture(scope="module")
def dynamic(conv_net: nn.Module, images: Tensor) -> QuantizedModel:
    return bitdial.quantize(conv_net, images, GREEDY.updated(extraction="dynamic"))


@pytest.fixture(scope="module")
def attention(transformer: nn.Module, images: Tensor) -> dict[str, QuantizedModel]:
    return {
        extraction: bitdial.quantize(transformer, images, GREEDY.updated(extraction=extraction, ratios=(0.5, 1.0)))
        for extraction in ("static", "dynamic")
    }


# -- forms of calibration -------------------------------------------------------------------------------------------------


class Loader:
    """A DataLoader-like object without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def same(a: QuantizedModel, b: QuantizedModel, x: Tensor) -> None:
    assert all(torch.equal(a(x, ratio=r), b(x, ratio=r)) for r in a.ratios)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(3)
    return Tiny()


def test_forms_of_calibration_agree(tiny: nn.Module) -> None:
    x, labels = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20)
    config = GREEDY.updated(group_size=4, ratios=(0.5, 1.0), calibration_images=20)
    pieces = list(x.split(7))
    forms: list[Any] = [
        x,
        pieces,
        tuple(pieces),
        (p for p in pieces),
        [(p, p[:, 0]) for p in pieces],
        [[p, 1] for p in pieces],
        [{"x": p, "label": p[:, 0]} for p in pieces],
        {"x": x},
        DataLoader(TensorDataset(x, labels), batch_size=6),
        Loader(pieces),
        torch.cat([x, torch.full((5, 6), 1e6)]),  # only the first calibration_images samples count
    ]
    for form in forms:
        (taken,) = gather(form, tiny, 20).inputs
        assert torch.equal(taken, x)
    made = [bitdial.quantize(tiny, form, config) for form in (x, Loader(pieces), {"x": x})]
    same(made[0], made[1], x)
    same(made[0], made[2], x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.a(left) + self.b(right))
        return self.d(torch.relu(self.c(x))) * scale, x


def test_several_inputs_and_outputs(helpers: Any) -> None:
    torch.manual_seed(0)
    model, left, right = TwoInputs(), torch.randn(16, 6), torch.randn(16, 4)
    config = GREEDY.updated(group_size=4, ratios=(1.0,))
    made = [
        bitdial.quantize(model, [(left, right)], config),
        bitdial.quantize(model, [{"left": left, "right": right}], config),
        bitdial.quantize(model, [{"right": right, "left": left}], config),  # in another order than forward()
        bitdial.quantize(model, DataLoader(TensorDataset(left, right, torch.arange(16)), batch_size=5), config),
    ]
    with torch.no_grad():
        expected = model(left, right)
    for quantized in made:
        for batch in ((left, right), [left, right], {"left": left, "right": right}, {"right": right, "left": left}):
            outputs = quantized(batch)
            assert isinstance(outputs, tuple) and len(outputs) == 2
            assert all(helpers.snr(e, o) > 25 for e, o in zip(expected, outputs, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(outputs, made[0]((left, right)), strict=True))
    with pytest.raises(InputError, match="2 input"):
        made[0](left)
    with pytest.raises(InputError, match="right"):
        made[0]({"left": left})


def test_the_model_is_not_changed(conv_net: nn.Module, images: Tensor) -> None:
    import copy

    model = copy.deepcopy(conv_net).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images.clone()
    bitdial.quantize(model, x, GREEDY.updated(ratios=(1.0,)))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items()) and torch.equal(x, images)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# -- bad input ------------------------------------------------------------------------------------------------------------

BAD_CALIBRATION: dict[str, tuple[Callable[[Tensor], Any], type[BitdialError], str]] = {
    "empty list": (lambda x: [], CalibrationError, "empty"),
    "empty tensor": (lambda x: x[:0], CalibrationError, "empty"),
    "empty batches": (lambda x: [x[:0], x[:0]], CalibrationError, "empty"),
    "scalar": (lambda x: torch.tensor(1.0), CalibrationError, "first dimension is the batch"),
    "nan": (
        lambda x: torch.where(torch.arange(len(x))[:, None] == 2, torch.nan, x),
        CalibrationError,
        "first in sample 2",
    ),
    "infinity": (
        lambda x: torch.where(torch.arange(len(x))[:, None] == 1, torch.inf, x),
        CalibrationError,
        "first in sample 1",
    ),
    "shapes that differ": (lambda x: [x, x[:, :5]], CalibrationError, "batch 1 has shape"),
    "numpy": (lambda x: x.numpy(), CalibrationError, "ndarray: pass tensors"),
    "list of numbers": (lambda x: [1.0, 2.0], CalibrationError, "float: pass tensors"),
    "text": (lambda x: "images/", CalibrationError, "str"),
    "a number": (lambda x: 7, CalibrationError, "int: pass a tensor"),
    "nothing": (lambda x: None, CalibrationError, "NoneType"),
    "dict of other names": (lambda x: [{"pixels": x}], CalibrationError, r"forward\(x\)"),
    "dict that changes": (lambda x: [{"x": x}, {"y": x}], CalibrationError, "batch 1"),
    "wrong width": (lambda x: x[:, :5], CaptureError, "Tiny"),
    "another rank": (lambda x: x[:, 0], BitdialError, "Tiny|shape"),
    "float64": (lambda x: x.double(), BitdialError, "float64"),
    "float16": (lambda x: x.half(), BitdialError, "float16"),
    "uint8": (lambda x: x.to(torch.uint8), BitdialError, "uint8"),
}


@pytest.mark.parametrize("name", list(BAD_CALIBRATION))
def test_bad_calibration(name: str, tiny: nn.Module) -> None:
    make, error, message = BAD_CALIBRATION[name]
    with pytest.raises(error, match=message):
        bitdial.quantize(tiny, make(torch.randn(4, 6)), GREEDY)


def test_values_that_overflow_in_the_network_are_named() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.exp(self.a(x) * 1e4))
            return out

    with pytest.raises(CalibrationError, match="'exp' is not finite"):
        bitdial.quantize(Overflow(), torch.randn(8, 6), GREEDY)


BAD_BATCHES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "size": (lambda x: x[:, :, :7], "shape"),
    "channels": (lambda x: x[:, :2], "shape"),
    "no batch axis": (lambda x: x[0], "shape"),
    "empty": (lambda x: x[:0], "shape"),
    "float64": (lambda x: x.double(), "float64"),
    "float64 array": (lambda x: x.double().numpy(), "float64"),
    "integers": (lambda x: x.to(torch.int64), "int64"),
    "uint8 array": (lambda x: np.zeros((2, 3, 8, 8), np.uint8), "uint8"),
    "uint16 array": (lambda x: np.zeros((2, 3, 8, 8), np.uint16), "uint16"),
    "text array": (lambda x: np.array(["a"]), "<U1|str"),
    "object array": (lambda x: np.array([None]), "object"),
    "nan": (lambda x: torch.where(x > 0, torch.nan, x), "NaN"),
    "infinity": (lambda x: x.numpy() / np.float32(0.0), "infinite"),
    "list": (lambda x: x.tolist(), "list"),
    "none": (lambda x: None, "NoneType"),
    "two tensors": (lambda x: (x, x), "tuple|input"),
    "dict of another name": (lambda x: {"pixels": x}, "x"),
}


@pytest.mark.parametrize("name", list(BAD_BATCHES))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_batches(name: str, qm: QuantizedModel, images: Tensor) -> None:
    make, message = BAD_BATCHES[name]
    with pytest.raises(InputError, match=message):
        qm(make(images[:2]))


@pytest.mark.parametrize(
    "ratio", [-0.01, 1.01, float("nan"), float("inf"), True, False, "0.5", None, [0.5], 1 + 0j, -1, 2]
)
def test_bad_ratios(ratio: Any, qm: QuantizedModel, images: Tensor) -> None:
    before = qm.ratio
    with pytest.raises(RatioError, match=r"ratio .*0\.\.1"):
        qm.set_ratio(ratio)
    assert qm.ratio == before
    if ratio is not None:
        with pytest.raises(RatioError):
            qm(images[:2], ratio=ratio)


def test_unknown_engines_and_options(conv_net: nn.Module, qm: QuantizedModel) -> None:
    with pytest.raises(EngineError, match="unknown engine 'gpu'"):
        QuantizedModel(qm.program, "gpu")
    with pytest.raises(EngineError, match="no option"):
        QuantizedModel(qm.program, "reference", threads=3)
    with pytest.raises(EngineError, match="no option"):
        QuantizedModel(qm.program, speed="high")
    with pytest.raises(EngineError, match="not available"):
        QuantizedModel(qm.program, device="nonsense")


# -- the dial -------------------------------------------------------------------------------------------------------------


def test_ratio_not_in_the_table_takes_the_nearest_below(qm: QuantizedModel, images: Tensor) -> None:
    assert qm.ratios == [0.0, 0.25, 0.5, 0.75, 1.0] and qm.ratio == 0.0
    for asked, taken in ((0.1, 0.0), (0.25, 0.25), (0.49, 0.25), (0.5, 0.5), (0.999, 0.75), (1, 1.0), (0, 0.0)):
        assert qm.set_ratio(asked) == taken == qm.ratio
        assert torch.equal(qm(images[:3]), qm(images[:3], ratio=taken))
        assert torch.equal(qm(images[:3], ratio=asked), qm(images[:3], ratio=taken))
    assert qm.set_ratio(np.float64(0.5)) == 0.5 and qm.set_ratio(np.float32(0.75)) == 0.75
    qm.set_ratio(0.0)
    different = [qm(images, ratio=r) for r in qm.ratios]
    assert all(not torch.equal(a, b) for a, b in zip(different[:-1], different[1:], strict=True))
    assert qm.ratio == 0.0, "a ratio for one call must not turn the dial"


def test_switching_is_one_store(qm: QuantizedModel, images: Tensor) -> None:
    """Nothing in the engine but the dial's index changes when it is turned."""
    for ratio in qm.ratios:
        qm(images[:1], ratio=ratio)
    engine: Any = qm.engine
    qm.set_ratio(0.0)
    before = {k: id(v) for k, v in vars(engine).items() if k != "_index"}
    settings = {i: {n: id(s.weight) for n, s in engine.settings(i).items()} for i in range(5)}
    for ratio in (1.0, 0.25, 0.5, 0.0):
        qm.set_ratio(ratio)
        qm(images[:1])
    assert before == {k: id(v) for k, v in vars(engine).items() if k != "_index"}
    assert settings == {i: {n: id(s.weight) for n, s in engine.settings(i).items()} for i in range(5)}


def test_threads(qm: QuantizedModel, images: Tensor) -> None:
    """Two threads at their own ratios and one at the dial's, while another turns it: every answer is that of one ratio, and
    that of a ratio the dial stood at while the call was made."""
    batch = images[:4]
    expected = {r: qm(batch, ratio=r) for r in qm.ratios}
    failures: list[str] = []
    stop = threading.Event()
    history: list[float] = [qm.set_ratio(0.0)]

    def fixed(ratio: float) -> None:
        for _ in range(25):
            if not torch.equal(qm(batch, ratio=ratio), expected[ratio]):
                failures.append(f"fixed {ratio}")

    def follower() -> None:
        for _ in range(25):
            first = len(history) - 1
            answer = qm(batch)
            allowed = set(history[first:])
            if not any(torch.equal(answer, expected[r]) for r in allowed):
                failures.append(f"dial {allowed}")

    def turner() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            ratio = qm.ratios[i * 2 % 5]
            history.append(ratio)  # before the store, so that no answer can be ahead of the history
            qm.set_ratio(ratio)
            stop.wait(0.0005)

    threads = [threading.Thread(target=fixed, args=(r,)) for r in (0.25, 1.0)] + [threading.Thread(target=follower)]
    turning = threading.Thread(target=turner)
    for thread in (turning, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    turning.join()
    qm.set_ratio(0.0)
    assert not failures and len(history) > 3


def test_the_ratio_is_read_at_the_start_of_a_call(qm: QuantizedModel, images: Tensor, monkeypatch: Any) -> None:
    engine: Any = qm.engine
    original, seen = engine.executor.step, []

    def step(node: Any, *rest: Any) -> Tensor:
        seen.append(node.name)
        if len(seen) == 3:
            qm.set_ratio(1.0)  # in flight
        result: Tensor = original(node, *rest)
        return result

    qm.set_ratio(0.0)
    expected = qm(images[:2])
    monkeypatch.setattr(engine.executor, "step", step)
    assert torch.equal(qm(images[:2]), expected)
    monkeypatch.undo()
    assert qm.ratio == 1.0 and torch.equal(qm(images[:2]), qm(images[:2], ratio=1.0))
    qm.set_ratio(0.0)


# -- outputs --------------------------------------------------------------------------------------------------------------


def test_numpy_in_numpy_out(qm: QuantizedModel, images: Tensor) -> None:
    expected = qm(images[:3], ratio=0.5)
    assert isinstance(expected, Tensor) and expected.dtype == torch.float32 and not expected.requires_grad
    got = qm(images[:3].numpy(), ratio=0.5)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32 and (got == expected.numpy()).all()
    frozen = images[:3].numpy().copy()
    frozen.setflags(write=False)
    assert (qm(frozen, ratio=0.5) == got).all()
    strided = images[:6].numpy()[::2]
    assert (qm(strided, ratio=0.5) == qm(strided.copy(), ratio=0.5)).all()
    wanting = images[:3].clone().requires_grad_(True)
    assert torch.equal(qm(wanting, ratio=0.5), expected)
    assert torch.equal(qm(images[:3].to(memory_format=torch.channels_last), ratio=0.5), expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_callers_torch_settings_change_nothing(qm: QuantizedModel, tiny: nn.Module, images: Tensor) -> None:
    expected = qm(images, ratio=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(qm(images, ratio=0.5), expected)
    with torch.backends.mkldnn.flags(enabled=False):  # other convolutions, of which some are not exact in float32
        assert torch.equal(qm(images, ratio=0.5), expected)
    with torch.inference_mode():
        assert torch.equal(qm(images, ratio=0.5), expected)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(qm(images, ratio=0.5), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    x = torch.randn(16, 6)
    plain = bitdial.quantize(tiny, x, GREEDY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(plain, bitdial.quantize(tiny, x, GREEDY), x)


def test_inputs_are_not_written_into(qm: QuantizedModel, images: Tensor) -> None:
    x = images[:4].clone()
    qm(x, ratio=1.0)
    assert torch.equal(x, images[:4])


def test_answers_do_not_depend_on_other_samples(qm: QuantizedModel, dynamic: QuantizedModel, images: Tensor) -> None:
    """Bit for bit, static and dynamic: alone, in other company, beside a loud sample, in another order."""
    loud = images[:6].clone()
    loud[3] *= 50.0
    for model in (qm, dynamic):
        for ratio in model.ratios:
            together = model(images[:6], ratio=ratio)
            assert torch.equal(torch.cat([model(x[None], ratio=ratio) for x in images[:6]]), together)
            beside = model(loud, ratio=ratio)
            quiet = [0, 1, 2, 4, 5]
            assert torch.equal(beside[quiet], together[quiet])
            assert torch.equal(model(images[:6].flip(0), ratio=ratio), together.flip(0))
    assert not torch.equal(qm(images[:6], ratio=1.0), dynamic(images[:6], ratio=1.0))


def test_attention_answers_do_not_depend_on_other_samples(
    attention: dict[str, QuantizedModel], images: Tensor, helpers: Any
) -> None:
    loud = images[:6].clone()
    loud[3] *= 50.0
    quiet = [0, 1, 2, 4, 5]
    for model in attention.values():
        together = model(images[:6], ratio=1.0)
        alone = torch.cat([model(x[None], ratio=1.0) for x in images[:6]])
        assert helpers.snr(together, alone) > 40.0  # LayerNorm and softmax in float may sum in another order
        assert helpers.snr(together[quiet], model(loud, ratio=1.0)[quiet]) > 40.0


class TimeFirst(nn.Module):
    """torch's own attention: linear layers on [tokens, batch, features] and [tokens * batch, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


@pytest.mark.parametrize("extraction", ["static", "dynamic"])
def test_time_first_attention(extraction: str, helpers: Any) -> None:
    torch.manual_seed(0)
    model = TimeFirst().eval()
    x = torch.randn(24, 5, 8)
    quantized = bitdial.quantize(model, x, GREEDY.updated(extraction=extraction, ratios=(1.0,), group_size=4))
    eligible = [n for n, layer in quantized.program.layers.items() if layer.eligible]
    assert len(eligible) == 2, "in_proj and out_proj"
    loud = x[:6].clone()
    loud[0] *= 30.0
    for ratio in (0.0, 1.0):
        together = quantized(x[:6], ratio=ratio)
        alone = torch.cat([quantized(v[None], ratio=ratio) for v in x[:6]])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(quantized(loud, ratio=ratio)[1:], together[1:], rtol=0, atol=1e-6)
    with torch.no_grad():
        assert helpers.snr(model(x), quantized(x, ratio=0.0)) > 25


# -- settings -------------------------------------------------------------------------------------------------------------


def test_keep_8bit_and_ignored(conv_net: nn.Module, images: Tensor, helpers: Any) -> None:
    config = GREEDY.updated(keep_8bit=("conv1",), ignored=("grouped", "head1"), ratios=(1.0,))
    made = bitdial.quantize(conv_net, images, config)
    layers = {entry["source"]: entry for entry in made.describe()["layers"]}
    assert layers["conv1"]["reason"] == "keep_8bit pattern 'conv1'" and layers["conv1"]["low_groups"] == [0, 0]
    assert "grouped" not in layers and "head1" not in layers and not layers["conv2"]["reason"]
    floats = {entry["source"]: entry["reason"] for entry in made.describe()["float_operators"]}
    assert floats["grouped"] == "ignored pattern 'grouped'" and "head1" in floats["head1"]
    with torch.no_grad():
        assert helpers.snr(conv_net(images), made(images)) > 20
    everything = bitdial.quantize(conv_net, images, GREEDY.updated(ignored="*"))
    assert not everything.program.layers
    with torch.no_grad():
        torch.testing.assert_close(everything(images, ratio=1.0), conv_net(images), rtol=1e-4, atol=1e-4)
    kept = bitdial.quantize(conv_net, images, GREEDY.updated(keep_8bit="*"))
    assert torch.equal(kept(images, ratio=0.0), kept(images, ratio=1.0))


def test_signal_falls_with_the_ratio(qm: QuantizedModel, conv_net: nn.Module, helpers: Any) -> None:
    test = helpers.images(32, seed=77)
    with torch.no_grad():
        exact = conv_net(test)
    snr = [helpers.snr(exact, qm(test, ratio=r)) for r in qm.ratios]
    assert snr[0] > 20 and all(b < a + 0.5 for a, b in zip(snr[:-1], snr[1:], strict=True)) and snr[-1] < snr[0] - 5


def test_more_bits_are_nearer(conv_net: nn.Module, images: Tensor, qm: QuantizedModel, helpers: Any) -> None:
    with torch.no_grad():
        exact = conv_net(images)
    snr = []
    for bits in (3, 5, 7):
        made = bitdial.quantize(conv_net, images, GREEDY.updated(low_bits=bits, ratios=(1.0,)))
        assert {(layer.amax, layer.wmax) for layer in made.program.layers.values() if layer.eligible} <= {
            (2**bits - 1, 2 ** (bits - 1) - 1),
            (2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1),
        }
        snr.append(helpers.snr(exact, made(images, ratio=1.0)))
    assert snr[0] + 3 < snr[1] < snr[2] - 3
    naive = bitdial.quantize(conv_net, images, GREEDY.updated(extraction="naive", ratios=(1.0,), bias_correction=False))
    assert helpers.snr(exact, naive(images, ratio=1.0)) < helpers.snr(exact, qm(images, ratio=1.0))


def test_bias_rows_restore_the_means(conv_net: nn.Module, images: Tensor, qm: QuantizedModel) -> None:
    plain = bitdial.quantize(conv_net, images, GREEDY.updated(bias_correction=False))
    with torch.no_grad():
        mean = conv_net(images).mean(0)
    for ratio in (0.5, 1.0):
        corrected = (qm(images, ratio=ratio).mean(0) - mean).abs().max()
        assert corrected < 0.3 * (plain(images, ratio=ratio).mean(0) - mean).abs().max()


def test_metric_and_evaluation(qm: QuantizedModel, conv_net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        labels = conv_net(images).argmax(1)
    batches = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    rows = qm.evaluate(batches, ratios=(0.0, 1.0))
    for row in rows:
        right = (qm(images, ratio=row["ratio"]).argmax(1) == labels).double().mean()
        assert row["accuracy"] == pytest.approx(float(right)) and row["samples"] == 32
        agreement = (qm(images, ratio=row["ratio"]).argmax(1) == qm(images, ratio=0.0).argmax(1)).double().mean()
        assert row["agreement"] == pytest.approx(float(agreement))
    assert rows[0]["agreement"] == 1.0 and rows[0]["distance"] == 0.0 and rows[1]["distance"] > 0
    assert (rows[0]["eligible_share"], rows[1]["eligible_share"]) == (0.0, 1.0) and rows[1]["low_share"] < 1.0

    calls = []

    def metric(outputs: Tensor, targets: Any) -> float:
        calls.append(tuple(outputs.shape))
        return float(-(outputs - targets).abs().mean())

    with torch.no_grad():
        made = bitdial.quantize(
            conv_net,
            images,
            GREEDY.updated(ratios=(1.0,)),
            evaluation=[(images[:20], conv_net(images[:20])), (images[20:], conv_net(images[20:]))],
            metric=metric,
        )
    assert [row["ratio"] for row in made.program.curve] == [0.0, 1.0]
    assert made.program.curve[1]["accuracy"] < made.program.curve[0]["accuracy"] < 0.0
    assert made.program.curve[0]["standard_error"] is None and set(calls) == {(20, 10), (12, 10)}
    with pytest.raises(BitdialError, match="no samples"):
        qm.evaluate([])


def test_describe_is_json_and_complete(qm: QuantizedModel) -> None:
    text = json.loads(json.dumps(qm.describe()))
    assert text["engine"]["name"] == "reference" and text["ratios"] == qm.ratios
    assert [entry["name"] for entry in text["layers"]] == list(qm.program.layers)
    for entry in text["layers"]:
        assert entry["source"] and entry["precision"] and len(entry["activation_shift"]) == entry["groups"]
        assert sum(entry["weight_shift_histogram"].values()) > 0


def test_same_seed_same_model(tiny: nn.Module) -> None:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    base = GREEDY.updated(group_size=2)
    for selector in ("random", "greedy", "evolutionary"):
        config = base.updated(selector=selector, population=6, generations=3, survivors=2, seed=4)
        first, second = (bitdial.quantize(tiny, x, config) for _ in range(2))
        for name, layer in first.program.layers.items():
            other = second.program.layers[name]
            assert (layer.low == other.low).all() and (layer.bias == other.bias).all()
        same(first, second, x)
    others = [bitdial.quantize(tiny, x, base.updated(selector="random", seed=s)) for s in (0, 1)]
    a, b = ([layer.low for layer in o.program.layers.values()] for o in others)
    assert any((p != q).any() for p, q in zip(a, b, strict=True))


def test_interrupted_search_resumes(conv_net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = GREEDY.updated(selector="evolutionary", population=6, generations=4, survivors=2, ratios=(0.25, 0.5))
    whole = bitdial.quantize(conv_net, images, config)
    file = tmp_path / "search.json"
    steps: list[float] = []

    def interrupt(stage: str, share: float) -> None:
        if stage == "search":
            steps.append(share)
            if share >= 0.6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitdial.quantize(conv_net, images, config, checkpoint=file, progress=interrupt)
    assert file.is_file() and len(steps) > 2
    seen: list[float] = []

    def watch(stage: str, share: float) -> None:
        if stage == "search":
            seen.append(share)

    resumed = bitdial.quantize(conv_net, images, config, checkpoint=file, progress=watch)
    assert min(seen) >= steps[-2], "the search began anew"
    same(whole, resumed, images)
    once, twice = (model.program.provenance["search"] for model in (whole, resumed))
    layers = [layer for layer in whole.program.layers.values() if layer.eligible and layer.n_groups]
    # each process measures the sensitivity of every layer; the search itself is counted once, whoever did it
    assert twice["evaluations"] == once["evaluations"] + len(layers)
    assert twice["candidate_images"] > once["candidate_images"] and twice["seconds"] > 0
    assert twice["image_evaluations"] == once["image_evaluations"]
    saved = json.loads(file.read_text())["costs"]
    assert resumed.program.provenance["seconds"]["quantize"] >= saved["seconds"] > 0
    assert {type(v) for v in (twice["evaluations"], twice["multiplies"], twice["cache_hits"])} == {int}
    with pytest.raises(BitdialError, match="belongs to another search"):
        bitdial.quantize(conv_net, images, config.updated(seed=9), checkpoint=file)


def test_save_and_load(qm: QuantizedModel, images: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "model.bitdial"
    qm.save(file)
    same(qm, bitdial.load(file), images)  # whichever engine is the default here
    loaded = bitdial.load(file, engine="reference")
    same(qm, loaded, images)
    assert json.dumps(loaded.describe()) == json.dumps(qm.describe())
    with pytest.raises(BitdialError):
        bitdial.load(tmp_path / "absent.bitdial")
    with pytest.raises(BitdialError, match="absent"):
        qm.save(tmp_path / "absent" / "model.bitdial")


def test_bitdial_errors_are_one_family() -> None:
    for error in (CalibrationError, CaptureError, ConfigError, EngineError, InputError, RatioError):
        assert issubclass(error, BitdialError)
    with pytest.raises(BitdialError):
        QuantizeConfig(low_bits=12)
