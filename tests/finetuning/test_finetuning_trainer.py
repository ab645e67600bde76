"""The loop: it learns, it resumes to the bit, it stops when it should, and it refuses what it cannot use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdial.errors import ConfigError, DataError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import LoaderBatches, SampledBatches, flip_and_crop, training_batches
from bitdial.finetuning.schedule import derivation_updates, evaluation_updates, low_index, passes, rate
from bitdial.finetuning.trainer import Interrupted
from bitdial.pipeline.finetuning import Finetuned, finetune_prepared

Subject = Any  # the named tuple of conftest.py
Lessons = tuple[Tensor, Tensor]
SMALL = FinetuneConfig(
    epochs=2,
    batch_size=16,
    learning_rate=2e-3,
    rederivations=1,
    precision="float32",
    device="cpu",
    checkpoint_seconds=0,
)


def train(subject: Subject, lessons: Lessons, config: FinetuneConfig = SMALL, **options: Any) -> Finetuned:
    batches = training_batches(lessons, config.batch_size, config.seed, flip_and_crop)
    return finetune_prepared(subject.prepared, subject.program, subject.config, config, batches, **options)


def weights(result: Finetuned) -> list[np.ndarray]:
    return [
        array
        for layer in result.program.layers.values()
        if layer.weight is not None
        for array in (layer.weight, layer.bias, layer.activation_shift, layer.weight_shift)
    ]


@pytest.fixture(scope="module")
def held_out(lessons: Lessons) -> Sequence[Any]:
    return [([lessons[0][:32]], lessons[1][:32])]


def test_training_lowers_the_loss_and_raises_the_validation_accuracy(
    conv_subject: Subject, lessons: Lessons, held_out: Any
) -> None:
    changed = (lessons[0], (lessons[1] + 1) % 10)  # the network knows none of these yet
    validation = [(inputs, (labels + 1) % 10) for inputs, labels in held_out]
    result = train(conv_subject, changed, SMALL.updated(epochs=5, distillation=0.0), validation=validation)
    rows = result.record.evaluations
    assert rows[0]["update"] == 0 and rows[-1]["update"] == 30
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert max(row["score"] for row in rows) > rows[0]["score"]
    assert result.program.provenance["finetuning"]["best_update"] == result.record.best_update


@pytest.mark.parametrize("reselect", [False, True])
def test_low_weights_of_their_own_are_given_up(conv_subject: Subject, lessons: Lessons, reselect: bool) -> None:
    """Training derives low weights, so shifts and bias rows that fitted stored ones go with them, and none is left behind."""
    config = SMALL.updated(epochs=1, learning_rate=1e-9, rederivations=0, bias="learned", keep="last", reselect=reselect)
    program = copy.deepcopy(conv_subject.program)
    rng = np.random.default_rng(0)
    shift = 0
    for layer in program.layers.values():
        if layer.weight is not None and layer.n_groups:
            layer.low_weight = rng.integers(-layer.wmax, layer.wmax + 1, layer.weight.shape).astype(np.int8)
            layer.bias[1:] += 1_000_000
            shift += 1
    assert shift > 1
    result = train(conv_subject._replace(program=program), lessons, config).program
    for name, layer in result.layers.items():
        assert layer.low_weight is None
        if layer.weight is not None and layer.n_groups:
            moved = np.abs(layer.bias[-1].astype(np.int64) - conv_subject.program.layers[name].bias[-1])
            assert moved.max() < 300_000, (name, moved.max())


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    conv_subject: Subject, lessons: Lessons, held_out: Any, tmp_path: Path
) -> None:
    config = SMALL.updated(passes="dual", low_ratio="mixed", scales="learned", batch_norm="reestimated", accumulation=2)
    whole = train(conv_subject, lessons, config, validation=held_out)
    checkpoint = tmp_path / "run.ckpt"
    for updates, end in ((1, 1), (2, 3), (1, 4)):  # in the middle of an epoch, at its end, after the derivation
        left = iter(range(updates - 1, -1, -1))
        with pytest.raises(Interrupted, match=f"after {end} of 6"):
            train(
                conv_subject, lessons, config, validation=held_out, checkpoint=checkpoint,
                stop=lambda left=left: next(left) == 0,
            )  # fmt: skip
    resumed = train(conv_subject, lessons, config, validation=held_out, checkpoint=checkpoint)
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert np.array_equal(a, b)
    assert [r["score"] for r in whole.record.evaluations] == [r["score"] for r in resumed.record.evaluations]


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(
    conv_subject: Subject, lessons: Lessons, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        train(conv_subject, lessons, checkpoint=checkpoint, stop=lambda: True)
    with pytest.raises(DataError, match=r"run\.ckpt belongs to a run with other settings"):
        train(conv_subject, lessons, SMALL.updated(learning_rate=1e-3), checkpoint=checkpoint)
    flipped = bytearray(checkpoint.read_bytes())
    flipped[-100] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    with pytest.raises(DataError, match=r"flipped\.ckpt is damaged"):
        train(conv_subject, lessons, checkpoint=tmp_path / "flipped.ckpt")
    with pytest.raises(DataError, match="other settings, data or weights"):
        train(conv_subject, (lessons[0] * 2, lessons[1]), checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"\x80\x04K\x01."):
        checkpoint.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable finetuning checkpoint"):
            train(conv_subject, lessons, checkpoint=checkpoint)


def test_a_loss_that_diverges_stops_training_and_keeps_the_best_state(
    conv_subject: Subject, lessons: Lessons, held_out: Any
) -> None:
    config = SMALL.updated(learning_rate=1e3, epochs=20, optimizer="sgd", gradient_clip=0.0)
    result = train(conv_subject, lessons, config, validation=held_out)
    assert "a smaller learning rate may help" in result.record.stopped
    assert result.record.diverged and result.record.updates < 120
    assert result.record.best_score >= result.record.evaluations[0]["score"]
    assert all(np.isfinite(layer.weight_scale).all() for layer in result.program.layers.values())


def test_the_best_state_is_the_result_unless_the_last_is_asked_for(
    conv_subject: Subject, lessons: Lessons, held_out: Any
) -> None:
    wrong = (lessons[0], (lessons[1] + 1) % 10)  # what it learns makes it worse on the held-out images
    config = SMALL.updated(distillation=0.0, epochs=5)
    last, best = (train(conv_subject, wrong, config.updated(keep=k), validation=held_out) for k in ("last", "best"))
    scores = [[row["score"] for row in result.record.evaluations] for result in (last, best)]
    assert scores[0] == scores[1] and scores[0][-1] < scores[0][0] and config.keep == "best"
    assert last.record.best_update == last.record.updates and best.record.best_update < 30
    alone = train(conv_subject, wrong, config)  # without held-out images there is only the last
    assert all(np.array_equal(a, b) for a, b in zip(weights(last), weights(alone), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights(last), weights(best), strict=True))


def test_patience_stops_early(conv_subject: Subject, lessons: Lessons, held_out: Any) -> None:
    result = train(conv_subject, lessons, SMALL.updated(learning_rate=1e-12, epochs=9, patience=2), validation=held_out)
    assert result.record.stopped == "no better score in 2 evaluations"
    assert result.record.updates == 12


def test_labels_beyond_the_network_s_classes_are_refused(conv_subject: Subject, lessons: Lessons) -> None:
    with pytest.raises(DataError, match="labels from 10 to 10, the network tells 10 classes apart"):
        train(conv_subject, (lessons[0], torch.full_like(lessons[1], 10)))
    with pytest.raises(DataError, match=r"targets are torch\.float32: give class indices"):
        train(conv_subject, (lessons[0], lessons[1].float()))


def test_reselection_keeps_the_ends_of_the_dial(conv_subject: Subject, lessons: Lessons, held_out: Any) -> None:
    plain = train(conv_subject, lessons, SMALL.updated(epochs=1), validation=held_out)
    again = train(conv_subject, lessons, SMALL.updated(epochs=1, reselect=True), validation=held_out)
    for name, layer in again.program.layers.items():
        other = plain.program.layers[name]
        if layer.weight is None:
            continue
        assert np.array_equal(layer.weight, other.weight) and np.array_equal(layer.weight_shift, other.weight_shift)
        assert np.array_equal(layer.low[-1], other.low[-1]) and np.array_equal(layer.bias[-1], other.bias[-1])
    shares = [again.program.eligible_share(i) for i in range(5)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=0.1)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    images, labels = torch.arange(40.0).reshape(10, 1, 2, 2), torch.arange(10)
    batches = SampledBatches(10, lambda at: (images[at], labels[at]), 3, seed=1, augment=flip_and_crop)
    first = [t.tolist() for _, t in batches.epoch(0)]
    assert first == [t.tolist() for _, t in batches.epoch(0)] != [t.tolist() for _, t in batches.epoch(1)]
    assert first[1:] == [t.tolist() for _, t in batches.epoch(0, 1)]
    assert len(first) == batches.steps == 3 and len({i for part in first for i in part}) == 9
    late = [x[0] for x, _ in batches.epoch(0, 2)]
    assert torch.equal(late[0], [x[0] for x, _ in batches.epoch(0)][2]), (
        "augmentation does not depend on where one starts"
    )


def test_a_shuffling_loader_repeats_its_order() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(12.0)[:, None], torch.arange(12))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    batches = LoaderBatches(loader, seed=3)
    orders = [[t.tolist() for _, t in batches.epoch(e)] for e in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(DataError, match="have no length"):
        _ = LoaderBatches(iter([])).steps
    with pytest.raises(DataError, match="training batch 0 is a dict"):
        next(LoaderBatches([{"x": 1}]).epoch(0))
    with pytest.raises(DataError, match="12 training inputs and 3 targets"):
        training_batches((torch.zeros(12, 1), torch.zeros(3)), 4, 0)


def test_flip_and_crop_moves_pictures_by_whole_pixels() -> None:
    images = torch.rand(16, 3, 8, 8)
    moved = flip_and_crop(images, torch.Generator().manual_seed(0), padding=2)
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(torch.stack([images, images.flip(3)]), (2,) * 4)
    for i in range(16):
        windows = [padded[f, i, :, y : y + 8, x : x + 8] for f in (0, 1) for y in range(5) for x in range(5)]
        assert any(torch.equal(moved[i], window) for window in windows)


def test_the_schedule_warms_up_anneals_and_settles() -> None:
    config = FinetuneConfig(learning_rate=1.0, warmup=0.1, rederivations=4, evaluations=2)
    rates = [rate(u, 100, config) for u in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0 and rates[99] < 0.001
    assert sorted(derivation_updates(100, config)) == [20, 40, 60, 80]
    assert sorted(evaluation_updates(50, 100, config)) == [25, 50, 75, 100]
    assert derivation_updates(100, config.updated(rederivations=0)) == frozenset()


def test_the_passes_of_a_step() -> None:
    mixed = FinetuneConfig()
    assert [low_index(s, 5, mixed) for s in range(0, 20, 2)] == [4] * 10
    assert {low_index(s, 5, mixed) for s in range(1, 99, 2)} == {1, 2, 3}
    assert {low_index(s, 2, mixed) for s in range(9)} == {1}
    assert {low_index(s, 5, mixed.updated(low_ratio="uniform")) for s in range(99)} == {1, 2, 3, 4}
    assert [i for i, _ in passes(0, 5, mixed)] == [0, 4]
    assert passes(0, 5, mixed.updated(passes="low", low_weight=2.0)) == [(4, 2.0)]
    assert {passes(s, 5, mixed.updated(passes="sampled"))[0][0] for s in range(99)} == {0, 1, 2, 3, 4}


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.epochs"):
        FinetuneConfig(epochs=0)
    with pytest.raises(ConfigError, match="nothing is left to learn from"):
        FinetuneConfig(cross_entropy=0.0, distillation=0.0)
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.colour"):
        FinetuneConfig(colour="blue")


def test_an_unknown_device_is_refused(conv_subject: Subject, lessons: Lessons) -> None:
    with pytest.raises(ConfigError, match="device 'nonsense' cannot be used here"):
        train(conv_subject, lessons, SMALL.updated(device="nonsense"))
