"""One model for several sequence lengths: same tables, shorter programs, padding that no answer depends on."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_networks import QUICK
from torch import Tensor, nn
from transformer_networks import Encoder, sentences

import bitdial
from bitdial.artifact import from_bytes, load_program, save_program, to_bytes
from bitdial.engines.base import available_engines, create_engine
from bitdial.engines.lengths import LengthsEngine
from bitdial.errors import ArtifactError, CalibrationError, CaptureError, ConfigError, InputError
from bitdial.quantization.lengths import at_length
from bitdial.quantization.program import Program
from bitdial.serving.worker.base import WorkerOptions
from bitdial.serving.worker.model import LoadedModel

ENGINES = [name for name in ("reference", "cpu") if not available_engines()[name]]
CONFIG = QUICK.updated(lower_first_last=True, lengths=(4, 8))
FULL = 12


def of_length(length: int, n: int = 5) -> list[Any]:
    """Sentences that fill at most `length` places, cut there."""
    rng = np.random.default_rng(length)
    own = [rng.integers(1, 40, (n, length)), (np.arange(length) < rng.integers(1, length + 1, (n, 1))).astype(np.int64)]
    own[1][0] = 1  # one fills it
    return own


def padded(batch: list[Any], length: int) -> list[Any]:
    return [np.pad(a, ((0, 0), (0, length - a.shape[1]))) for a in batch]


@cache
def model() -> Program:
    torch.manual_seed(0)
    calibration = tuple(torch.from_numpy(a) for a in sentences(8, 1))
    return bitdial.quantize(Encoder().eval(), [calibration], CONFIG).program


@pytest.mark.parametrize("engine", ENGINES)
def test_every_length_gives_what_the_network_of_that_length_gives(engine: str) -> None:
    """A batch of 3 goes to the program of 4, of 7 to that of 8, 12 to the longest; each as that program alone."""
    program = model()
    both = create_engine(program, engine)
    assert isinstance(both, LengthsEngine) and list(both.engines) == [4, 8, FULL]
    for given, used in ((3, 4), (4, 4), (7, 8), (9, FULL), (FULL, FULL)):
        batch = of_length(given)
        alone = create_engine(at_length(program, used), engine)
        for ratio in program.ratios:
            want = alone.run(padded(batch, used), ratio)
            np.testing.assert_array_equal(both.run(batch, ratio), want)


def test_engines_agree_at_every_length() -> None:
    if len(ENGINES) < 2:
        pytest.skip("the compiled extension is not built")
    first, second = (create_engine(model(), name) for name in ENGINES)
    assert second.engines[4].can_profile  # type: ignore[attr-defined]  # all of it is compiled
    for given in (2, 4, 6, 12):
        for ratio in (0.0, 1.0):
            np.testing.assert_array_equal(first.run(of_length(given), ratio), second.run(of_length(given), ratio))


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_changes_no_bit_of_an_answer(engine: str) -> None:
    """Masked places take no part, and sums over more zeros are the same sums."""
    longest = create_engine(at_length(model(), FULL), engine)
    both = create_engine(model(), engine)
    for given in (2, 4, 7, 11):
        batch = of_length(given)
        for ratio in (0.0, 0.5, 1.0):
            np.testing.assert_array_equal(both.run(batch, ratio), longest.run(padded(batch, FULL), ratio))


def test_zeros_that_a_batch_ends_with_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may pad to the full length."""
    engine = create_engine(model(), ENGINES[-1])
    assert isinstance(engine, LengthsEngine)
    want = engine.run(of_length(3), 0.5)
    for length, unwanted in engine.engines.items():
        if length != 4:
            monkeypatch.setattr(unwanted, "run", lambda *_: pytest.fail("a longer program ran"))
    np.testing.assert_array_equal(engine.run(padded(of_length(3), FULL), 0.5), want)
    tensors = [torch.from_numpy(a) for a in padded(of_length(3), FULL)]
    np.testing.assert_array_equal(engine.run(tensors, 0.5).numpy(), want)


def test_one_dial_and_tensors(tmp_path: Path) -> None:
    engine = create_engine(model(), ENGINES[-1])
    assert engine.set_ratio(0.6) == engine.ratio == 0.5
    batch = [torch.from_numpy(a) for a in of_length(3)]
    torch.testing.assert_close(engine.run(batch), engine.run(batch, 0.5), rtol=0, atol=0)
    assert engine.describe()["lengths"] == [4, 8, FULL]


def test_a_file_holds_all_lengths_and_shares_what_is_equal(tmp_path: Path) -> None:
    program = model()
    several = save_program(program, tmp_path / "several.bitdial")
    one = save_program(dataclasses.replace(program, lengths={}), tmp_path / "one.bitdial")
    assert several.weights == one.weights and several.tables == one.tables and several.low_planes == one.low_planes
    again = load_program(tmp_path / "several.bitdial")
    assert to_bytes(again) == to_bytes(program)
    for given in (3, 8, 12):
        want = create_engine(program, "reference").run(of_length(given), 1.0)
        np.testing.assert_array_equal(create_engine(again, "reference").run(of_length(given), 1.0), want)
    banded = from_bytes(to_bytes(program, band=(0.5, 1.0)))
    np.testing.assert_array_equal(
        create_engine(banded, "reference").run(of_length(3), 1.0), create_engine(program, "reference").run(of_length(3), 1.0)
    )
    assert bitdial.artifact.inspect_file(tmp_path / "several.bitdial")["lengths"] == [4, 8]


def test_programs_whose_lengths_do_not_fit_are_not_written() -> None:
    program = model()
    for lengths in ({5: program.lengths[4]}, {FULL: program.lengths[4]}, {40: program.lengths[8]}):
        with pytest.raises(ArtifactError, match="length"):
            to_bytes(dataclasses.replace(program, lengths=lengths))
    short = program.lengths[4]
    with pytest.raises(ArtifactError):
        to_bytes(dataclasses.replace(program, lengths={4: dataclasses.replace(short, types=program.types)}))


@pytest.mark.parametrize(("lengths", "told"), [((13,), "1 to 12"), ((4, 3), "different lengths")])
def test_batches_that_fit_no_length(lengths: tuple[int, ...], told: str) -> None:
    batch = [of_length(lengths[0])[0], of_length(lengths[-1])[1]]
    with pytest.raises(InputError, match=told):
        create_engine(model(), ENGINES[-1]).run(batch)


class Changing(nn.Module):
    """Leaves a layer out where sequences are short."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices)
        y: Tensor = self.second(x if indices.shape[1] < 4 else torch.relu(self.first(x)))
        return y


def test_lengths_that_cannot_be_served_are_refused() -> None:
    x = torch.randint(0, 9, (8, 6))
    with pytest.raises(CaptureError, match="length 3"):
        bitdial.quantize(Changing().eval(), x, QUICK.updated(lengths=(3,)))
    with pytest.raises(CalibrationError, match="not shorter"):
        bitdial.quantize(Changing().eval(), x, QUICK.updated(lengths=(6,)))
    with pytest.raises(ConfigError, match="positive"):
        QUICK.updated(lengths=(0,))


class Unmasked(Changing):
    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.words(indices)).mean(dim=1))
        return y


def test_a_network_that_sees_padding_is_refused() -> None:
    with pytest.raises(CalibrationError, match="mask"):
        bitdial.quantize(Unmasked().eval(), torch.randint(0, 9, (8, 6)), QUICK.updated(lengths=(4,)))


def test_outputs_per_token_are_cut() -> None:
    x = torch.randint(0, 9, (8, 6))
    quantized = bitdial.quantize(Changing().eval(), x, QUICK.updated(lengths=(4,)))
    full = quantized(x, ratio=0.0)
    for given in (2, 4, 5):
        got = quantized(x[:, :given], ratio=0.0)
        torch.testing.assert_close(got, full[:, :given], rtol=0, atol=0)


def test_a_served_model_answers_padded_requests() -> None:
    """Its description is that of the full length; requests of a batch go to the length of the longest of them."""
    loaded = LoadedModel(to_bytes(model()), "text.bitdial", **WorkerOptions(engine=ENGINES[-1], max_batch=4).loading())
    assert [t.shape for t in loaded.info.inputs] == [(-1, FULL), (-1, FULL)]
    batch = padded(of_length(3, 4), FULL)
    outputs, _, problems = loaded.run(batch, [1, 2, 1], 1)
    assert not any(problems)
    np.testing.assert_array_equal(outputs[0], create_engine(at_length(model(), FULL), "reference").run(batch, model().ratios[1]))
