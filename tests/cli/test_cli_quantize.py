from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from bitdial.artifact import load_program
from bitdial.cli.inspect import low_bits_of
from bitdial.cli.terminal import Terminal

GREEDY = ["--target", "paper", "--selector", "greedy", "--no-evaluate"]


def test_result_is_kept_in_the_file(artifact: Path) -> None:
    program = load_program(artifact)
    assert [row["ratio"] for row in program.curve] == program.ratios == [0.0, 0.25, 0.5, 0.75, 1.0]
    evaluation = program.provenance["evaluation"]
    assert evaluation["images"] == 100 and evaluation["data"] == "digits" and evaluation["split"] == "test"
    labels = [(row["label"], row["ratio"]) for row in evaluation["baselines"]]
    assert labels == [("float32", None), ("naive 4-bit", 0.5), ("naive 4-bit", 1.0)]
    assert program.curve[0]["agreement"] == 1.0 and program.curve[0]["low_share"] == 0.0
    assert program.provenance["source"]["model"] == "zoo:digits"
    assert not list(artifact.parent.glob("*.search.json"))


def test_json_is_one_object_and_shares_are_those_of_the_file(bitdial, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.bitdial"
    result = bitdial("quantize", *settings, *GREEDY, "--ratios", "0.5,100", "-o", out, "--json")
    assert result.code == 0
    content = result.json
    program = load_program(out)
    assert program.ratios == [0.0, 0.5, 1.0] and content["curve"] == [] and content["baselines"] == []
    assert content["sizes"]["total"] == out.stat().st_size
    assert content["low_share"]["50 %"] == pytest.approx(program.low_share(1))


def test_images_without_content_are_told_and_kept_in_the_file(bitdial, weights: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "black.npz", tmp_path / "a.bitdial"
    np.savez(data, images=np.zeros((16, 1, 8, 8), np.float32), labels=np.arange(16) % 10)
    options = ["--model", "zoo:digits", "--weights", weights, "--data", data, "--threads", "1", "--ratios", "100"]
    result = bitdial("quantize", *options, *GREEDY, "-o", out, "--json")
    assert result.code == 0, result.err
    (told,) = result.json["warnings"]
    assert "'x' is all zero" in told and f"note: {told}" in result.err
    assert f"warning: {told}" in bitdial("inspect", out).out


def test_options_reach_the_program(bitdial, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.bitdial"
    options = ["--group-size", "32", "--low-bits", "5", "--low-bits-weights", "3", "--extraction", "dynamic"]
    patterns = ["--keep-8bit", "block1*", "--ignored", "block2.projection*", "--weight-granularity", "group"]
    chosen = [*GREEDY, *options, *patterns, "--independent", "--seed", "3"]
    result = bitdial("quantize", *settings, *chosen, "-o", out, "--json")
    assert result.code == 0, result.err
    program = load_program(out)
    config = program.provenance["config"]
    assert program.extraction == "dynamic" and config["seed"] == 3 and config["nested"] is False
    sources = {name: node.source for name, node in program.graph.producers().items()}
    assert "block2.projection.0" not in {sources[name] for name in program.layers}
    assert "block2.projection.0" in {sources[name] for name in program.float_reasons}
    for name, layer in program.layers.items():
        assert layer.eligible == sources[name].startswith(("block2", "block3"))
        assert layer.weight_granularity == "group"
        if layer.eligible:
            assert (layer.amax, layer.wmax) == (31, 3) and layer.group_bounds[1] == 32
    # The 64 * 128 * 4 * 4 multiplies that run in float count among all multiplies of the network.
    integer = sum(layer.macs for layer in program.layers.values())
    expected = program.low_share(4) * integer / (integer + 64 * 128 * 4 * 4)
    assert result.json["low_share"]["100 %"] == pytest.approx(expected)


def test_a_target_gives_layers_their_widths_and_inspect_shows_them(
    bitdial, settings: list[str], artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.bitdial"
    options = ["--target", "avx2", "--selector", "greedy", "--no-evaluate", "--ratios", "100", "--low-weights", "derived"]
    assert bitdial("quantize", *settings, *options, "-o", out).code == 0
    assert "low bits per layer for target avx2," in bitdial("inspect", out).out
    content = bitdial("inspect", out, "--json").json
    assert content["file"]["provenance"]["target"] == {"name": "avx2", "resolved": "avx2"}
    limits = {tuple(v["low_range"].values()) for v in content["description"]["layers"] if not v["reason"]}
    assert (63, 63) in limits
    assert "4 low bits (target paper)," in bitdial("inspect", artifact).out
    wrong = bitdial("quantize", *settings, "--target", "toaster", "-o", tmp_path / "b.bitdial")
    assert wrong.code == 2 and "--target: " in wrong.err and "'avx512vnni'" in wrong.err


@pytest.mark.parametrize(
    "config, target, told",
    [
        ({"low_bits": 5, "target": "cpu"}, {"name": "cpu", "resolved": "avx2"}, "5 low bits"),
        ({"low_bits": 4}, None, "4 low bits"),  # of a file from before targets
        ({"low_bits": "auto", "target": "npu"}, {"name": "npu", "resolved": "npu"}, "4 low bits (target npu)"),
        (
            {"low_bits": "auto", "target": "cpu", "latency_table": None},
            {"name": "cpu", "resolved": "avx512vnni"},
            "low bits per layer for target cpu (avx512vnni)",
        ),
        ({"low_bits": "auto", "latency_table": {"target": "zen4"}}, None, "low bits per layer by the times of zen4"),
        ({"low_bits": "auto"}, "nonsense", "low bits per layer"),
    ],
)
def test_what_inspect_says_of_widths(config: dict[str, object], target: object, told: str) -> None:
    assert low_bits_of(config, target) == told


def test_band(bitdial, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.bitdial"
    assert bitdial("quantize", *settings, *GREEDY, "--band", "100..100", "-o", out).code == 0
    program = load_program(out)
    assert program.ratios == [1.0]
    assert bitdial("inspect", out, "--json").json["file"]["packed_layers"] == 7
    full = tmp_path / "b.bitdial"
    assert bitdial("quantize", *settings, *GREEDY, "-o", full).code == 0
    assert out.stat().st_size < 0.65 * full.stat().st_size
    measured = bitdial("evaluate", out, "--data", "digits", "--images", "20", "--json").json
    assert measured["agreement_against"] == 1.0 and [row["ratio"] for row in measured["curve"]] == [1.0]


@pytest.mark.parametrize(
    "extra, kind, told",
    [
        ([], "ConfigError", "--data"),
        (["--data", "digits", "--band", "30..40"], "ConfigError", "--band"),
        (["--data", "digits", "--ratios", "0,150"], "ConfigError", "--ratios"),
        (["--data", "digits", "--selector", "psychic"], "ConfigError", "selector"),
        (["--data", "digits", "--mean", "0.5", "--std", "0.5"], "ConfigError", "--mean"),
        (["--data", "no-such-folder"], "DataError", "no-such-folder"),
        (["--data", "digits", "--report", "no-such-folder/r.html"], "OutputError", "no-such-folder"),
        (["--data", "digits", "--weights", "absent.safetensors"], "DataError", "absent"),
        (["--data", "digits", "--images", "5000"], "DataError", "5000"),
    ],
)
def test_bad_settings_are_found_before_the_work(bitdial, tmp_path: Path, extra: list[str], kind: str, told: str) -> None:
    out = tmp_path / "a.bitdial"
    result = bitdial("quantize", "--model", "zoo:digits", "-o", out, *extra, "--json")
    assert result.code == 2
    assert result.json["type"] == kind and told in result.json["error"]
    assert list(tmp_path.iterdir()) == []


def test_output_is_not_replaced_without_force(bitdial, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.bitdial"
    out.write_text("precious")
    refused = bitdial("quantize", *settings, *GREEDY, "-o", out)
    assert refused.code == 2 and "--force" in refused.err and out.read_text() == "precious"
    assert bitdial("quantize", *settings, *GREEDY, "-o", out, "--force").code == 0
    assert len(load_program(out).layers) == 9


def test_output_places_that_cannot_be_written(bitdial, settings: list[str], tmp_path: Path) -> None:
    assert "folder" in bitdial("quantize", *settings, "-o", tmp_path).err
    assert "does not exist" in bitdial("quantize", *settings, "-o", tmp_path / "sub" / "a.bitdial").err
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        assert "cannot write" in bitdial("quantize", *settings, "-o", locked / "a.bitdial").err


def test_an_interrupted_search_goes_on(
    bitdial, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ["--no-evaluate", "--population", "4", "--generations", "3", "--search-images", "16"]

    def run(name: str, stop_at: float) -> tuple[int, str, list[float]]:
        seen: list[float] = []

        @contextlib.contextmanager
        def progress(self: Terminal):
            def report(stage: str, share: float) -> None:
                if stage == "search":
                    seen.append(share)
                    if share >= stop_at:
                        raise KeyboardInterrupt

            yield report

        monkeypatch.setattr(Terminal, "progress", progress)
        result = bitdial("quantize", *settings, *search, "-o", tmp_path / name)
        return result.code, result.err, seen

    code, told, _ = run("a.bitdial", 0.6)
    checkpoint = tmp_path / "a.bitdial.search.json"
    assert code == 130 and checkpoint.exists() and not (tmp_path / "a.bitdial").exists()
    assert str(checkpoint) in told and "--no-resume" in told
    code, told, resumed = run("a.bitdial", 2.0)
    assert code == 0 and not checkpoint.exists() and "going on" in told
    code, _, whole = run("b.bitdial", 2.0)
    assert code == 0 and len(resumed) < len(whole)
    a, b = load_program(tmp_path / "a.bitdial"), load_program(tmp_path / "b.bitdial")
    for name in a.layers:
        assert (a.layers[name].low == b.layers[name].low).all()
        assert (a.layers[name].bias == b.layers[name].bias).all()


def test_a_stop_before_the_search_keeps_nothing(
    bitdial, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitdial.api.quantize", stopped)
    result = bitdial("quantize", *settings, "-o", tmp_path / "a.bitdial", "--json")
    assert result.code == 130 and "nothing was written" in result.err
    assert result.json["type"] == "KeyboardInterrupt" and list(tmp_path.iterdir()) == []


def test_what_the_users_code_prints_stays_out_of_the_json(bitdial, weights: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "from bitdial.zoo.digits_net import DigitsNet\nprint('chatter of the user')\n\n\n"
        "def build():\n    print('more')\n    return DigitsNet()\n"
    )
    out = tmp_path / "a.bitdial"
    model = ["--model", f"{source}:build", "--weights", weights, "--data", "digits", "--images", "16"]
    result = bitdial("quantize", *model, *GREEDY, "-o", out, "--json")
    assert result.code == 0 and result.json["command"] == "quantize"
    assert "chatter of the user" in result.err
    assert load_program(out).provenance["source"]["model"] == "mine.py:build"


def test_an_onnx_file_brings_its_weights(bitdial, weights: Path, settings: list[str], tmp_path: Path) -> None:
    import warnings

    import torch

    pytest.importorskip("onnx", reason="reading ONNX files needs the package onnx")
    from bitdial.zoo.registry import build_model

    network, file, out = build_model("zoo:digits", weights), tmp_path / "digits.onnx", tmp_path / "a.bitdial"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.zeros(1, 1, 16, 16),), file, dynamo=False, opset_version=17)
    data = settings[settings.index("--data") :]
    greedy = ["--selector", "greedy", "--eval-images", "50", "--no-naive", "--ratios", "100"]
    result = bitdial("quantize", "--model", file, *data, *greedy, "-o", out, "--json")
    assert result.code == 0, result.err
    assert "random weights" not in result.err
    (baseline,) = result.json["baselines"]
    assert baseline["label"] == "float32" and baseline["accuracy"] > 0.5 and baseline["agreement"] >= 0.96
    source = load_program(out).provenance["source"]
    assert source["model"] == "digits.onnx" and source["weights"] is None
    refused = bitdial("quantize", "--model", file, "--weights", weights, *data, "-o", tmp_path / "c.bitdial")
    assert refused.code == 2 and "brings its weights" in refused.err
    file.write_bytes(file.read_bytes()[:2000])
    broken = bitdial("quantize", "--model", file, *data, "-o", tmp_path / "c.bitdial")
    assert broken.code == 2 and "digits.onnx" in broken.err and not (tmp_path / "c.bitdial").exists()
