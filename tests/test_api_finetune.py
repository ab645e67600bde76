"""`bitdial.finetune`: forms of data, the start, resumption, divergence, bad input."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitdial
import bitdial.api
from bitdial import FinetuneConfig, QuantizeConfig, QuantizedModel
from bitdial.errors import CalibrationError, ConfigError, DataError
from bitdial.finetuning.trainer import Interrupted, TrainingProgress

SEARCH = QuantizeConfig(
    target="paper", selector="greedy", calibration_images=32, search_images=8, group_size=8, ratios=(0.0, 0.5, 1.0)
)
SETTINGS = FinetuneConfig(
    epochs=1, batch_size=16, rederivations=1, precision="float32", learning_rate=3e-3, distillation=0.0
)


@pytest.fixture(scope="module")
def data(helpers: Any, conv_net: nn.Module) -> tuple[Tensor, Tensor]:
    """Images [96, 3, 8, 8] and labels that the network is near to, and can learn: its own, were no class preferred."""
    images: Tensor = helpers.images(96, seed=5)
    with torch.no_grad():
        logits = conv_net(images)
        return images, (logits - logits.mean(0)).argmax(1)


@pytest.fixture(scope="module")
def start(conv_net: nn.Module, data: tuple[Tensor, Tensor]) -> QuantizedModel:
    return bitdial.quantize(conv_net, data[0][:32], SEARCH)


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch, prepared: dict[Any, Any]) -> None:
    """Equal networks, calibration and settings are captured once for all tests: torch.export takes most of their time."""
    real = bitdial.api.prepare_model

    def prepare(model: nn.Module, calibration: Any, config: QuantizeConfig, **options: Any) -> Any:
        if not isinstance(calibration, Tensor):
            return real(model, calibration, config, **options)
        state = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        key = (hash(state), hash(calibration.numpy().tobytes()), config)
        if key not in prepared:
            prepared[key] = real(model, calibration, config, **options)
        return dataclasses.replace(prepared[key], output_means={})

    monkeypatch.setattr(bitdial.api, "prepare_model", prepare)


@pytest.fixture(scope="module")
def prepared() -> dict[Any, Any]:
    return {}


def tensors(model: QuantizedModel) -> dict[str, np.ndarray[Any, Any]]:
    """Everything that an engine computes with."""
    found = {f"factor {s.name}": getattr(s, "factor", getattr(s, "factors", None)) for s in model.program.instructions}
    for name, layer in model.program.layers.items():
        for what in ("weight", "weight_scale", "multiplier", "activation_shift", "weight_shift", "low", "bias"):
            value = getattr(layer, what)
            if value is not None:
                found[f"{what} {name}"] = value
    return found


def same(a: QuantizedModel, b: QuantizedModel) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_training_brings_every_ratio_closer(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel
) -> None:
    weights = {k: v.clone() for k, v in conv_net.state_dict().items()}
    stages: list[str] = []
    seen: list[TrainingProgress] = []
    tuned = bitdial.finetune(
        conv_net, data, data[0][:32], settings=SETTINGS.updated(epochs=4, evaluations=2), start=start, validation=data,
        evaluation=[data], progress=lambda stage, share: stages.append(stage), training=seen.append,
    )  # fmt: skip
    record = tuned.program.provenance["finetuning"]
    before = [row["accuracy"] for row in record["before"]]
    after = [row["accuracy"] for row in tuned.program.curve]
    assert sum(after) > sum(before) and after[-1] > before[-1]
    assert record["best_update"] > 0 and record["stopped"] == "" and record["config"]["epochs"] == 4
    assert [row["accuracy"] for row in start.evaluate([data])] == before  # the start is as it was
    assert not same(tuned, start) and tuned.ratios == start.ratios
    for name, layer in start.program.layers.items():
        assert np.array_equal(layer.low, tuned.program.layers[name].low)
        assert np.array_equal(layer.group_bounds, tuned.program.layers[name].group_bounds)
    assert all(torch.equal(v, weights[k]) for k, v in conv_net.state_dict().items())
    assert "export" in stages and [p.update for p in seen] == list(range(1, 25)) and seen[0].updates == 24
    assert seen[-1].seconds > 0 and len(seen[-1].accuracies) == 3


def test_saved_and_loaded_it_computes_the_same(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel, tmp_path: Path
) -> None:
    tuned = bitdial.finetune(conv_net, data, data[0][:32], settings=SETTINGS, start=start)
    tuned.save(tmp_path / "a.bitdial")
    loaded = bitdial.load(tmp_path / "a.bitdial")
    assert same(loaded, tuned) and loaded.program.provenance["finetuning"] == tuned.program.provenance["finetuning"]
    for ratio in tuned.ratios:
        torch.testing.assert_close(loaded(data[0][:4], ratio), tuned(data[0][:4], ratio), rtol=0, atol=0)


def test_quantizing_first_and_forms_of_data(conv_net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    batches = [(images[a : a + 16], labels[a : a + 16]) for a in range(0, 48, 16)]
    loader = DataLoader(TensorDataset(images[:48], labels[:48]), batch_size=16)
    config = SEARCH.updated(ratios=(0.0, 1.0))
    from_list = bitdial.finetune(conv_net, batches, images[:32], config, SETTINGS, validation=batches[:1])
    from_loader = bitdial.finetune(
        conv_net, loader, images[:32], config, SETTINGS, validation=(images[:16], labels[:16])
    )
    assert same(from_list, from_loader)  # neither shuffles
    assert from_list.program.provenance["config"]["selector"] == "greedy" and from_list.ratios == [0.0, 1.0]
    own = bitdial.finetune(conv_net, data, config=config, settings=SETTINGS)  # calibrated on the training images
    assert own.program.provenance["calibration"]["samples"] == 32


@pytest.mark.parametrize("stop_after", [1, 4])
def test_an_interrupted_training_ends_with_the_same_weights(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel, tmp_path: Path, stop_after: int
) -> None:
    options: dict[str, Any] = {"settings": SETTINGS.updated(passes="sampled"), "start": start, "validation": data}
    whole = bitdial.finetune(conv_net, data, data[0][:32], **options)
    path, seen = tmp_path / "ckpt", []
    with pytest.raises(Interrupted):
        bitdial.finetune(
            conv_net, data, data[0][:32], checkpoint=path, training=seen.append, stop=lambda: len(seen) >= stop_after - 1,
            **options,
        )  # fmt: skip
    assert path.exists() and seen[-1].update < 6
    resumed = bitdial.finetune(conv_net, data, data[0][:32], checkpoint=path, **options)
    assert same(whole, resumed) and not path.exists()


def test_a_checkpoint_that_is_damaged_or_of_another_run_is_refused(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel, tmp_path: Path
) -> None:
    path = tmp_path / "ckpt"

    def run(**changes: Any) -> QuantizedModel:
        return bitdial.finetune(
            conv_net, data, data[0][:32], settings=SETTINGS.updated(**changes), start=start, checkpoint=path,
            stop=lambda: True,
        )  # fmt: skip

    with pytest.raises(Interrupted):
        run()
    written = path.read_bytes()
    with pytest.raises(DataError, match="other settings, data or weights"):
        run(learning_rate=2e-3)
    assert path.read_bytes() == written
    for damaged in (written[:-100], written[:200], b"", b"\x80\x04K\x01.", written[:8] + b"{" * 100 + written[108:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="delete it to train from the start"):
            run()


def test_divergence_keeps_the_best_state(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel
) -> None:
    settings = SETTINGS.updated(learning_rate=1e3, batch_size=2, gradient_clip=0.0)
    tuned = bitdial.finetune(
        conv_net, data, data[0][:32], settings=settings, start=start, validation=data, evaluation=[data]
    )
    record = tuned.program.provenance["finetuning"]
    assert "the loss" in record["stopped"] and record["updates"] < 48 and record["best_update"] == 0
    before, after = record["before"], tuned.program.curve
    assert all(abs(a["accuracy"] - b["accuracy"]) < 0.1 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "options, kind, told",
    [
        ({"labels": 10}, DataError, "10 classes"),
        ({"floats": True}, DataError, "class indices"),
        ({"config": SEARCH}, ConfigError, "leave config out"),
        ({"calibration": None}, ConfigError, "calibration"),
        ({"calibration": slice(1, 33)}, DataError, "other images"),
        ({"weights": 1.5}, DataError, "other"),
        ({"settings": {"device": "cuda:99"}}, ConfigError, "cuda:99"),
        ({"settings": {"device": "abacus"}}, ConfigError, "abacus"),
        ({"data": "nothing"}, DataError, "training batch 0"),
        ({"data": 3}, DataError, "training data"),
        ({"data": []}, DataError, "empty"),
        ({"data": [torch.zeros(2, 3, 8, 8)]}, DataError, "batch 0"),
        ({"validation": [1, 2]}, DataError, "batch 0"),
        ({"start": "tuned"}, DataError, "finetuned already"),
        ({"start": "band"}, DataError, "band"),
    ],
)
def test_bad_input(
    conv_net: nn.Module, data: tuple[Tensor, Tensor], start: QuantizedModel, tmp_path: Path, options: dict[str, Any],
    kind: type[Exception], told: str,
) -> None:  # fmt: skip
    images, labels = data
    network, calibration, begin = conv_net, images[:32], start
    given: Any = (images, labels)
    if "labels" in options:
        given = (images, labels + options["labels"])
    if "floats" in options:
        given = (images, labels.float())
    if "data" in options:
        given = options["data"]
    if "calibration" in options:
        calibration = None if options["calibration"] is None else images[options["calibration"]]
    if "weights" in options:
        network = copy.deepcopy(conv_net)
        with torch.no_grad():
            network.conv1.weight[0].mul_(options["weights"])
    if options.get("start") == "band":
        start.save(tmp_path / "band.bitdial", band=(1.0, 1.0))
        begin = bitdial.load(tmp_path / "band.bitdial")
    if options.get("start") == "tuned":
        program = dataclasses.replace(start.program, provenance={**start.program.provenance, "finetuning": {}})
        begin = QuantizedModel(program)
    with pytest.raises(kind, match=told):
        bitdial.finetune(
            network, given, calibration, options.get("config"), SETTINGS.updated(**options.get("settings", {})), start=begin,
            validation=options.get("validation"),
        )  # fmt: skip


def test_a_start_of_another_network_is_refused(
    helpers: Any, data: tuple[Tensor, Tensor], start: QuantizedModel
) -> None:
    torch.manual_seed(3)
    wider = helpers.estimate(helpers.conv_net(channels=32), data[0])
    with pytest.raises(DataError, match="another network"):
        bitdial.finetune(wider, data, data[0][:32], settings=SETTINGS, start=start)


def test_empty_calibration_is_still_an_error_of_calibration(conv_net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(CalibrationError):
        bitdial.finetune(conv_net, data, [], SEARCH, SETTINGS)
