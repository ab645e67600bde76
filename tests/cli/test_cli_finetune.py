"""`bitdial finetune` on the digits: end to end, interrupted, diverging, and given the wrong things."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.artifact import load_program
from bitdial.cli import finetune_work, main

QUICK = [
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--train-images",
    "64",
    "--validation-images",
    "16",
    "--rederivations",
    "1",
]
QUICK += ["--threads", "1", "--precision", "float32"]


@pytest.fixture(scope="module")
def prepared() -> dict[Any, Any]:
    return {}


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch, prepared: dict[Any, Any]) -> None:
    """Equal networks, calibration and settings are captured once for all tests: torch.export takes most of their time."""
    real = finetune_work.prepare_model

    def prepare(model: Any, calibration: Any, config: Any, **options: Any) -> Any:
        state = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        key = (hash(state), hash(calibration.numpy().tobytes()), config)
        if key not in prepared:
            prepared[key] = real(model, calibration, config, **options)
        return dataclasses.replace(prepared[key], output_means={})

    monkeypatch.setattr(finetune_work, "prepare_model", prepare)


@pytest.fixture(scope="session")
def original(weights: Path) -> list[str]:
    """The network that `artifact` was made from."""
    return ["--model", "zoo:digits", "--weights", str(weights), "--data", "digits"]


def computed(path: Path) -> dict[str, Any]:
    """Everything in a file that an engine computes with."""
    program = load_program(path)
    found: dict[str, Any] = {f"factor {s.name}": getattr(s, "factor", getattr(s, "factors", None)) for s in program.instructions}
    for name, layer in program.layers.items():
        for what in ("weight", "weight_scale", "multiplier", "activation_shift", "weight_shift", "low", "bias"):
            found[f"{what} {name}"] = getattr(layer, what)
    return found


def same(a: Path, b: Path) -> bool:
    first, second = computed(a), computed(b)
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def tuned(artifact: Path, original: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuned model with its page and picture beside it."""
    folder = tmp_path_factory.mktemp("tuned")
    extra = ["--eval-images", "60", "--report", str(folder / "t.html"), "--plot", str(folder / "t.svg"), "--quiet"]
    assert main(["finetune", str(artifact), *original, *QUICK, *extra, "-o", str(folder / "t.bitdial")]) == 0
    return folder / "t.bitdial"


def test_result_is_kept_in_the_file(tuned: Path, artifact: Path) -> None:
    program, before = load_program(tuned), load_program(artifact)
    record = program.provenance["finetuning"]
    assert record["updates"] == 4 and record["stopped"] == "" and len(record["evaluations"]) == 2
    assert record["data"]["training"] == 64 and record["data"]["validation"] == 16 and not record["data"]["augmented"]
    assert [row["ratio"] for row in record["before"]] == [row["ratio"] for row in program.curve] == program.ratios
    for old, new, change in zip(record["before"], program.curve, record["differences"], strict=True):
        assert change["difference"] == pytest.approx(new["accuracy"] - old["accuracy"])
        assert old["samples"] == new["samples"] == 60
    assert program.provenance["evaluation"]["baselines"][0]["label"] == "float32"
    for name, layer in before.layers.items():  # the groups are those of the start, the weights are not
        assert np.array_equal(layer.low, program.layers[name].low)
    assert not same(tuned, artifact)
    assert sorted(p.name for p in tuned.parent.iterdir()) == ["t.bitdial", "t.html", "t.svg"]
    page = (tuned.parent / "t.html").read_text()
    assert "Before and after" in page and "60 test images of digits" in page


def test_other_commands_know_of_it(bitdial: Any, tuned: Path, tmp_path: Path) -> None:
    shown = bitdial("inspect", tuned).out
    kept = load_program(tuned).provenance["finetuning"]["best_update"]
    assert f"finetuned: 1 epochs, dual passes, after update {kept} of 4" in shown
    assert bitdial("report", tuned, "-o", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "best update" in page and "standard error" not in page.partition("best update")[2][:200]


def test_json_is_one_object_and_validation_is_apart(
    bitdial: Any, artifact: Path, original: list[str], tmp_path: Path
) -> None:
    result = bitdial("finetune", artifact, *original, *QUICK, "--no-evaluate", "-o", tmp_path / "a.bitdial", "--json")
    assert result.code == 0, result.err
    content = result.json
    assert content["command"] == "finetune" and content["curve"] == [] == content["before"]
    assert content["training"]["config"]["batch_size"] == 16 and content["warnings"] is not None
    assert content["evaluation"] is None and load_program(tmp_path / "a.bitdial").curve == []
    assert "epoch 1/1, update 4/4" in result.err


def test_parts_of_the_data_do_not_overlap() -> None:
    from bitdial.errors import DataError
    from bitdial.zoo.datasets import load_dataset

    train = load_dataset("digits", "train")
    parts = finetune_work.split_train(train, 32, 3, None, None, None)
    held, taught = set(parts.validation.indices.tolist()), set(parts.training.indices.tolist())
    assert len(held) == len(parts.validation) == int(0.05 * len(train))
    assert not held & taught and len(held | taught) == len(train) and not parts.augmented
    assert parts.calibration.indices.tolist() == train.calibration_subset(32, 3).indices.tolist()
    assert set(parts.calibration.indices.tolist()) <= taught
    with pytest.raises(DataError, match="--validation-images"):
        finetune_work.split_train(train, 32, 3, len(train) - 31, None, None)


def after_update(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Have `act` called in the middle of an update of the next training."""
    from bitdial.finetuning.trainer import Trainer

    real = Trainer._one_update

    def update(self: Trainer, steps: Any) -> None:
        if self.update == number - 1:
            act()
        real(self, steps)

    monkeypatch.setattr(Trainer, "_one_update", update)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_loses_nothing(
    bitdial: Any, artifact: Path, original: list[str], tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    presses: int,
) -> None:  # fmt: skip
    out, checkpoint = tmp_path / "a.bitdial", tmp_path / "a.bitdial.finetune.ckpt"
    command = ["finetune", artifact, *original, *QUICK, "--no-evaluate", "--checkpoint-seconds", "0", "-o", out]

    def press() -> None:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)

    former = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        after_update(patched, 3, press)
        stopped = bitdial(*command)
    assert stopped.code == 130 and "the same command goes on" in stopped.err and str(checkpoint) in stopped.err
    assert checkpoint.exists() and not out.exists() and signal.getsignal(signal.SIGINT) is former
    went_on = bitdial(*command)
    assert went_on.code == 0 and f"going on with the training in {checkpoint}" in went_on.err
    assert same(out, tuned) and not checkpoint.exists()


def test_a_damaged_checkpoint_is_refused_and_can_be_left_behind(
    bitdial: Any, artifact: Path, original: list[str], tuned: Path, tmp_path: Path
) -> None:
    out, checkpoint = tmp_path / "a.bitdial", tmp_path / "a.bitdial.finetune.ckpt"
    checkpoint.write_bytes(b"\x80\x04\x95 not a checkpoint")
    command = ["finetune", artifact, *original, *QUICK, "--no-evaluate", "-o", out]
    refused = bitdial(*command, "--json")
    assert refused.code == 2 and refused.json["type"] == "DataError" and "delete it" in refused.json["error"]
    assert not out.exists() and checkpoint.exists()
    assert bitdial(*command, "--no-resume", "--quiet").code == 0 and same(out, tuned) and not checkpoint.exists()


def test_divergence_is_said_and_the_best_state_written(
    bitdial: Any, artifact: Path, original: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "a.bitdial"
    wild = ["--learning-rate", "1e6", "--warmup", "0", "--no-evaluate"]
    result = bitdial(
        "finetune", artifact, *original, *QUICK, "--epochs", "12", *wild, "-o", out, "--report", tmp_path / "r.html"
    )
    assert result.code == 0 and "training ended early: the loss" in result.err and "is kept" in result.err
    record = load_program(out).provenance["finetuning"]
    assert record["stopped"] and record["updates"] < 48
    assert "Training ended early" in (tmp_path / "r.html").read_text()


def test_without_a_start_the_network_is_quantized_first_and_once(
    bitdial: Any, original: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.bitdial"
    few = ["--selector", "greedy", "--search-images", "8", "--images", "16", "--ratios", "0,100", "--seed", "2"]
    command = ["finetune", *original, *QUICK, *few, "--no-evaluate", "-o", out]
    with monkeypatch.context() as patched:
        after_update(patched, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert bitdial(*command).code == 130
    assert {p.suffix for p in tmp_path.iterdir()} == {".ckpt", ".start"}
    result = bitdial(*command)
    assert result.code == 0 and "going on with the quantized model" in result.err
    program = load_program(out)
    assert program.ratios == [0.0, 1.0] and program.provenance["source"]["model"] == "zoo:digits"
    assert program.provenance["config"]["seed"] == program.provenance["finetuning"]["config"]["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.bitdial"]


def write_npz(path: Path, classes: list[str]) -> Path:
    from bitdial.zoo.datasets import load_dataset

    part = load_dataset("digits", "train")
    kept = np.flatnonzero(part.labels < len(classes))
    np.savez(path, images=part.images(kept), labels=part.labels[kept], classes=np.array(classes))
    return path


@pytest.mark.parametrize(
    "case, kind, told",
    [
        (
            "no model",
            "ConfigError",
            "holds 8-bit weights only; finetuning needs the original ones: give --model and --weights",
        ),
        ("no weights", "ConfigError", "give --model and --weights"),
        ("no data", "ConfigError", "--data"),
        ("nothing", "ConfigError", "--model"),
        ("random weights", "ConfigError", "random weights"),
        ("existing output", "OutputError", "--force"),
        ("output is the start", "ConfigError", "another name"),
        ("no folder", "OutputError", "does not exist"),
        ("report", "OutputError", "does not exist"),
        ("plot", "ConfigError", ".png"),
        ("setting of quantization", "ConfigError", "--group-size"),
        ("learning rate", "ConfigError", "--learning-rate"),
        ("device", "ConfigError", "abacus"),
        ("start is no model", "ArtifactError", ""),
        ("start is finetuned", "DataError", "finetuned already"),
        ("other weights", "DataError", "the weights are others"),
        ("other images", "DataError", "other images"),
        ("other network", "DataError", "another network"),
        ("more classes", "DataError", "tells 10 classes apart"),
        ("fewer classes", "DataError", "tells 10 apart"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(
    bitdial: Any, artifact: Path, original: list[str], weights: Path, tuned: Path, tmp_path: Path, case: str, kind: str,
    told: str,
) -> None:  # fmt: skip
    start, out, given, extra = [artifact], tmp_path / "a.bitdial", list(original), [*QUICK]
    if case == "no model":
        given = given[4:]
    elif case == "no weights":
        given = [*given[:2], *given[4:]]
    elif case == "no data":
        given = given[:4]
    elif case == "nothing":
        start, given = [], []
    elif case == "random weights":
        start, given = [], [*given[:2], *given[4:]]
    elif case == "existing output":
        out.write_text("precious")
    elif case == "output is the start":
        out = tmp_path / "start.bitdial"
        shutil.copy(artifact, out)
        start = [out]
        extra += ["--force"]
    elif case == "no folder":
        out = tmp_path / "absent" / "a.bitdial"
    elif case == "report":
        extra += ["--report", str(tmp_path / "absent" / "r.html")]
    elif case == "plot":
        extra += ["--plot", str(tmp_path / "r.gif")]
    elif case == "setting of quantization":
        extra += ["--group-size", "8"]
    elif case == "learning rate":
        extra += ["--learning-rate", "-1"]
    elif case == "device":
        extra += ["--device", "abacus"]
    elif case == "start is no model":
        start = [weights]
    elif case == "start is finetuned":
        start = [tuned]
    elif case == "other weights":
        import torch
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        name = next(k for k in state if state[k].dim() == 4)
        state[name] = state[name] * torch.linspace(0.5, 2.0, len(state[name]))[:, None, None, None]
        save_file(state, tmp_path / "other.safetensors")
        given[3] = str(tmp_path / "other.safetensors")
    elif case == "other images":
        extra += ["--split-seed", "5"]
    elif case == "other network":
        given[1] = "zoo:digits_wide"
        from safetensors.torch import save_file

        from bitdial.zoo.registry import build_model

        save_file(build_model("zoo:digits_wide").state_dict(), tmp_path / "wide.safetensors")
        given[3] = str(tmp_path / "wide.safetensors")
    elif case == "more classes":
        given[5] = str(write_npz(tmp_path / "more.npz", [f"class{i}" for i in range(10)]))
        with np.load(given[5]) as content:
            np.savez(
                given[5], images=content["images"], labels=content["labels"] + 1, classes=[*content["classes"], "x"]
            )
    elif case == "fewer classes":
        given[5] = str(write_npz(tmp_path / "fewer.npz", ["five", "kinds", "of", "digits", "only"]))
    before = sorted(p.name for p in tmp_path.iterdir())
    result = bitdial("finetune", *start, *given, *extra, "-o", out, "--json")
    assert result.code == 2, result.err
    assert result.json["type"] == kind and told in result.json["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert case != "existing output" or out.read_text() == "precious"
