"""Real networks: scores and their errors, rows, resuming and tables, on a tiny network of its own (no data are needed)."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitdial.artifact import load_program
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig

MODULES = (
    "machine", "results", "common", "measure", "scores", "sentence_encoder", "peers", "peers.protocol", "peers.worker",
    "peers.preparation", "peers.bitdial_preparation", "real_networks_data", "real_networks_rows", "real_networks_ablation",
    "real_networks_layers", "real_networks_table", "real_networks",
)  # fmt: skip


def one_hot(answers: list[int]) -> np.ndarray[Any, Any]:
    return np.eye(3, dtype=np.float32)[answers]


def test_top_one_is_paired_with_float(bench: dict[str, ModuleType]) -> None:
    score = bench["scores"].TopOne(np.array([0, 1, 2, 0]))
    figures = score.figures(one_hot([0, 1, 0, 1]), one_hot([0, 1, 2, 1]))
    assert (figures["accuracy"], figures["to_float"], figures["agreement"]) == (0.5, -0.25, 0.75)
    # Per image the difference is 0, 0, -1, 0: variance 1/4 over 4 images. Unpaired it would be 0.38.
    assert figures["to_float_standard_error"] == pytest.approx(0.25)
    assert bench["measure"].unpack_flags(figures["correct"], 4).tolist() == [True, True, False, False]


def test_ranks_share_the_mean_of_ties(bench: dict[str, ModuleType]) -> None:
    scores = bench["scores"]
    assert scores.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert scores.spearman(np.array([1.0, 2.0, 30.0]), np.array([5.0, 6.0, 7.0])) == pytest.approx(1.0)
    assert scores.spearman(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(3 / math.sqrt(10))
    assert scores.spearman(np.ones(3), np.arange(3.0)) == 0.0


def test_errors_of_correlations_come_from_resampled_pairs(bench: dict[str, ModuleType]) -> None:
    scores = bench["scores"]
    draws = np.random.default_rng(0)
    truth = draws.normal(size=400)
    reference = truth + 0.5 * draws.normal(size=400)
    spread, none = scores.bootstrap(reference, reference, truth, 0, resamples=200)
    # The textbook error of a correlation r of normal values is about (1 - r^2) / sqrt(n): 0.01 here; equal networks differ by 0.
    assert 0.006 < spread < 0.016 and none == 0.0
    alike = scores.bootstrap(reference + 0.02 * draws.normal(size=400), reference, truth, 0, resamples=200)[1]
    assert 0.0 < alike < spread / 4  # pairing takes out what both networks share
    assert scores.bootstrap(reference, truth, truth, 3, 50) == scores.bootstrap(reference, truth, truth, 3, 50)


def test_pairs_are_the_two_halves_of_the_outputs(bench: dict[str, ModuleType]) -> None:
    embeddings = np.array([[1, 0], [1, 1], [0, 1], [2, 0], [1, 0], [0, -3]], np.float32)
    assert bench["scores"].similarities(embeddings) == pytest.approx([1.0, math.sqrt(0.5), -1.0])
    figures = bench["scores"].PairRanks(np.array([5.0, 3.0, 0.0])).figures(embeddings, embeddings)
    assert figures["accuracy"] == pytest.approx(1.0) and figures["to_float"] == 0.0 and figures["agreement"] == pytest.approx(1.0)


def test_padding_does_not_reach_a_sentence(bench: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    sizes = {"vocabulary": 9, "positions": 6, "kinds": 2, "width": 8, "inner": 16, "heads": 2, "layers": 1}
    encoder = bench["sentence_encoder"].SentenceEncoder(**sizes, epsilon=1e-12).eval()
    assert set(bench["sentence_encoder"].own_names(1).values()) == set(encoder.state_dict())
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        a, b = (encoder(torch.tensor([[4, 2, 7, rest, rest]]), mask) for rest in (0, 5))
        short = encoder(torch.tensor([[4, 2, 7]]), mask[:, :3])
    assert torch.equal(a, b)
    torch.testing.assert_close(a, short)


def test_rows_that_this_version_cannot_make_are_named(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench["real_networks_rows"]
    future = rows.Configuration("future", "bitdial, some day", {"seed": 1, "telepathy": True})
    monkeypatch.setattr(rows, "CONFIGURATIONS", (*rows.CONFIGURATIONS, future))
    told: list[str] = []
    assert rows.choose_rows("greedy,future,nncf", told.append) == ["float", "nncf", "greedy"]
    assert told == ["row 'future' left out: QuantizeConfig has no telepathy"]
    assert {"float", "nncf", "onnxruntime", "default", "greedy", "derived"} <= set(rows.choose_rows(None, told.append))
    with pytest.raises(ConfigError, match="lucky"):
        rows.choose_rows("lucky", told.append)


def test_modules_are_looked_for_in_the_peers_own_environment(bench: dict[str, ModuleType]) -> None:
    missing = bench["real_networks"].missing_modules
    assert missing("/nowhere/python", ["json"]) == ["json"]


class Direct:
    """A contestant in this process; counts its preparations."""

    loads = 0
    shown: dict[str, Any]

    def __init__(self, adapter: str, log: Path, **_: Any) -> None:
        self.adapter = importlib.import_module(f"peers.{adapter}").create()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        Direct.loads += do == "load"
        return dict(importlib.import_module("peers.worker").answer(self.adapter, {"do": do, **arguments}))

    def close(self) -> None:
        pass


@pytest.fixture
def tiny(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A network of two inputs, registered under the name "tiny"; its preparations happen in this process."""
    data = bench["real_networks_data"]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.last(self.middle(self.first(a + b).relu()).relu())

    def samples(n: int) -> list[Any]:
        draws = np.random.default_rng(n)
        return [draws.normal(size=(n, 8)).astype(np.float32) for _ in range(2)]

    weights = tmp_path / "weights"
    weights.write_bytes(b"tiny")
    network = data.Network(
        "tiny", 16, (), (), lambda: weights, lambda: Two().eval(), samples,
        lambda n: (samples(n or 40), bench["scores"].TopOne(np.arange(n or 40) % 3)),
    )  # fmt: skip
    monkeypatch.setitem(data.NETWORKS, "tiny", network)
    monkeypatch.setattr(bench["real_networks"], "Worker", Direct)
    monkeypatch.setattr(bench["real_networks"].NetworkRun, "onnx", lambda _: weights)  # the exporter is slow to begin
    monkeypatch.setattr(Direct, "loads", 0)
    return network


def run_of(bench: dict[str, ModuleType], network: Any, folder: Path, *arguments: str) -> Any:
    real = bench["real_networks"]
    options = real.own_options(["--networks", "resnet20", "--results", str(folder / "results"), *arguments])
    return real.NetworkRun(network, options, folder / "cache" / "real_networks")


def test_wrong_options(bench: dict[str, ModuleType]) -> None:
    for arguments in (["--networks", "lenet"], ["--calibration", "0"]):
        with pytest.raises(ConfigError, match=arguments[0]):
            bench["real_networks"].own_options(arguments)


def test_what_a_network_lacks_is_said(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = bench["real_networks_data"]
    monkeypatch.setenv("BITDIAL_DATA", str(tmp_path / "nowhere"))
    assert "DATA FOLDER MISSING" in data.NETWORKS["resnet20"].missing()
    lacking = dataclasses.replace(data.MINILM, needs=("no_such_encoder",))
    assert lacking.missing().startswith("no_such_encoder not installed")


def test_rows_are_made_once_and_again_when_asked(bench: dict[str, ModuleType], tiny: Any, tmp_path: Path) -> None:
    run = run_of(bench, tiny, tmp_path)
    assert run.measure("float") and run.measure("greedy") and Direct.loads == 1
    row = run.file.rows["greedy"]
    assert [entry["ratio"] for entry in row["entries"]] == [0.0, 0.25, 0.5, 0.75, 1.0] and row["samples"] == 40
    assert row["file_bytes"] > 0 and row["preparation"]["peak_bytes"] > 0 and row["preparation"]["cpu_seconds"] > 0.0
    assert {"capture", "calibrate", "8-bit model", "save"} <= set(row["preparation"]["stages"])
    assert row["engine"] in ("cpu", "reference") and row["deviation_from_reference"] < 1e-5

    again = run_of(bench, tiny, tmp_path)
    assert again.measure("greedy") and Direct.loads == 1
    again.file.rows["greedy"]["preparation"]["provisional"] = False
    again.file.write()
    refresh = run_of(bench, tiny, tmp_path, "--refresh-seconds")
    assert refresh.measure("greedy") and Direct.loads == 1
    refresh.file.rows["greedy"]["preparation"]["provisional"] = True
    assert refresh.measure("greedy") and Direct.loads == 2
    other = run_of(bench, tiny, tmp_path, "--calibration", "12")
    assert other.measure("greedy") and Direct.loads == 3

    lines = bench["real_networks_table"].table_rows(other.file.rows)
    assert [line[0] for line in lines[:3]] == ["float32", "bitdial, 4 bits, greedy, 8-bit", "bitdial, 4 bits, greedy, 25 %"]
    assert lines[0][2:7] == [""] * 5 and lines[1][4] and lines[2][4:] == [""] * 4


def test_a_preparation_outlives_an_interrupted_evaluation(
    bench: dict[str, ModuleType], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench["real_networks"], "choose_engine", interrupted)
        run_of(bench, tiny, tmp_path).measure("greedy")
    assert Direct.loads == 1
    run = run_of(bench, tiny, tmp_path)
    assert run.measure("greedy") and Direct.loads == 1 and "greedy" in run.file.rows


def test_a_file_of_other_outputs_is_no_result(
    bench: dict[str, ModuleType], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(path: Path) -> Any:
        program = load_program(path)
        layer = next(iter(program.layers.values()))
        layer.bias = layer.bias + 1000
        return program

    monkeypatch.setattr("bitdial.artifact.load_program", damaged)
    assert not run_of(bench, tiny, tmp_path).measure("greedy")
    assert "gives other outputs at 0 % than what was saved in it" in capsys.readouterr().err


def test_a_contestant_that_fails_leaves_no_row(
    bench: dict[str, ModuleType], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise bench["peers.protocol"].PeerError("out of luck")

    run = run_of(bench, tiny, tmp_path)
    monkeypatch.setattr(run, "prepare", fail)
    assert not run.measure("nncf") and "nncf" not in run.file.rows
    assert "tiny nncf: FAILED: out of luck" in capsys.readouterr().err


def test_a_hook_leaves_out_its_step_alone(bench: dict[str, ModuleType]) -> None:
    """Errors of the low weights at 100 % rise without each step, and nothing of it stays switched off."""
    ablation = bench["real_networks_ablation"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)).eval()
    inputs = torch.randn(160, 2) @ torch.randn(2, 8)  # alike, so that one weight can make up for another
    config = QuantizeConfig(target="paper", ratios=(0.5, 1.0), selector="greedy", seed=0)
    prepared = prepare(model, [inputs], config)
    names = ("", "ridge", "gptq", "order", "")
    low, error = [], []
    for hook in names:
        with ablation.switched_off(hook):
            program = quantize_prepared(prepared, config)
        outputs = ReferenceEngine(program).run(inputs, 1.0)
        error.append(float((outputs - model(inputs)).square().sum().detach()))
        (layer,) = (layer for layer in program.layers.values() if layer.low.any())
        low.append(layer.low_weight)
    assert np.array_equal(low[0], low[-1]) and error[0] == error[-1]
    assert all(not np.array_equal(low[0], other) for other in low[1:-1])
    assert min(error[1:3]) > 1.1 * error[0], error
    with pytest.raises(KeyError), ablation.switched_off("luck"):
        pass


def test_the_ablation_has_rows_and_a_file_of_its_own(bench: dict[str, ModuleType], tiny: Any, tmp_path: Path) -> None:
    real, ablation = bench["real_networks"], bench["real_networks_ablation"]
    run = run_of(bench, tiny, tmp_path, "--ablation")
    assert run.file.path.name.startswith("real_networks_ablation.tiny.")
    assert not run.applies("without-scales") and run.applies("without-ridge") and run.applies("all")
    assert real.chosen_rows(run.options) == [*(step.name for step in ablation.ABLATION), "layers"]
    assert run.settings("without-ridge") != run.settings("without-gptq") != run.settings("all")
    assert run.measure("without-ridge") and run.file.rows["without-ridge"]["settings"]["hook"] == "ridge"
    assert run.measure("layers") and [e["layer"] for e in run.file.rows["layers"]["layers"]] and run.measure("layers")
    (line,) = ablation.ablation_rows(run.file.rows)
    assert line[0].startswith("ridge") and len(line) == 4 and "±" in line[3]
    assert "| tiny, without | 8-bit | 50 % | 100 % |" in ablation.ablation_markdown({"tiny": run.file.rows}, "here")
    assert all(step.hook in {"", *ablation.HOOKS} and not step.unknown() for step in ablation.ABLATION)


def test_the_layer_that_holds_the_loss_is_found(bench: dict[str, ModuleType]) -> None:
    """One of two low layers is made to err ten times as much."""
    losses = bench["real_networks_layers"]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)), nn.Linear(16, 3)).eval()
    inputs = torch.randn(64, 16)
    config = QuantizeConfig(target="paper", ratios=(1.0,), selector="greedy", group_size=16)
    program = quantize_prepared(prepare(model, [inputs], config), config)
    low = [n for n, layer in program.layers.items() if layer.low[-1].any()]
    assert len(low) == 2
    program.layers[low[1]].low_weight[:, ::2] = 0
    exact = model(inputs).detach().numpy()

    def run(other: Any) -> Any:
        return ReferenceEngine(other).run(inputs, 1.0).numpy()

    found = losses.layer_losses(program, run, exact, lambda *_: None)
    assert [entry["layer"] for entry in found["layers"]] == [low[1], low[0]] and found["layers"][0]["share"] > 0.5
    assert found["error_8bit"] < 0.1 * found["error"] and program.layers[low[0]].low[-1].all()
    assert losses.layer_lines(found)[0][:3] == [low[1], "2 of 2", "16x16"]
    assert low[1] in "".join(losses.layers_markdown("tiny", found))


def test_tables_mark_what_is_provisional(bench: dict[str, ModuleType]) -> None:
    table = bench["real_networks_table"]
    entry = {
        "ratio": None, "accuracy": 0.887, "standard_error": 0.01, "to_float": -0.012, "to_float_standard_error": 0.004,
        "agreement": 0.95,
    }  # fmt: skip
    spent = {"wall_seconds": 61.4, "cpu_seconds": 99.6, "peak_bytes": 3 << 30, "provisional": True}
    rows = {
        "nncf": {"entries": [entry], "file_bytes": 5 << 20, "preparation": spent, "samples": 744},
        "float": {"entries": [entry], "file_bytes": 18 << 20, "samples": 744},
    }
    assert table.table_rows(rows) == [
        ["float32", "88.70 ± 1.00", "", "", "", "", "", "18.0"],
        ["OpenVINO int8 (NNCF)", "88.70", "-1.20 ± 0.40", "95.0", "~61", "~100", "3,072", "5.0"],
    ]
    text = table.markdown({"lite0": rows}, "here")
    assert "| lite0 | float32 |" in text and "|  | OpenVINO int8 (NNCF) |" in text and "--refresh-seconds" in text
    assert table.sample_counts(rows) == [744]


def test_time_is_split_by_stage_and_others_are_seen(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    preparation = bench["peers.preparation"]
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(preparation.time, "perf_counter", lambda: next(clock))
    stages = preparation.Stages()
    for stage in ("capture", "search", "search", "capture"):
        stages(stage, 0.5)
    assert {name: wall for name, (wall, _) in stages.close().items()} == {"capture": 6.0, "search": 3.0}

    machine = iter([100.0, 100.0 + 6.0])  # all processors together worked 6 s, this process for 2 of them
    own = iter([10.0, 12.0])
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(preparation, "busy_seconds", lambda: next(machine))
    monkeypatch.setattr(preparation, "own_seconds", lambda: next(own))
    monkeypatch.setattr(preparation.os, "cpu_count", lambda: 2)
    spent = preparation.timed(lambda: None)
    assert (spent["wall_seconds"], spent["cpu_seconds"], spent["others_share"], spent["provisional"]) == (4.0, 2.0, 0.5, True)
