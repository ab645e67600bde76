"""The language-model benchmark: training and its cache, rows, paired differences, tables. Stored figures are made up."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bitdial.errors import ConfigError, DataError
from language.char_transformer import CharTransformer
from language.text import TextData, load_text

MODULES = (
    "machine", "results", "common", "measure", "accuracy_rows", "language_model_training", "language_model",
)  # fmt: skip
Bench = dict[str, ModuleType]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextData, TextData]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat. a dog ran to the log. " * 120, encoding="utf-8")
    return load_text(path)


def silent(stage: str, share: float) -> None:
    """No progress."""


def tiny(vocabulary: int) -> CharTransformer:
    return CharTransformer(vocabulary, dim=32, depth=1, heads=2, context=16)


def test_training_learns_and_its_cache_is_checked(
    bench: Bench, text: tuple[TextData, TextData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench["language_model_training"]
    monkeypatch.setattr(module, "char_transformer", tiny)
    before = torch.random.get_rng_state()
    model, digest, report = module.trained_model(*text, 30, 0, tmp_path, silent)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert report["steps"] == 30 and report["validation_loss"] < 0.9 * math.log(len(text[0].vocabulary))
    (file,) = tmp_path.glob("*.safetensors")

    def never(stage: str, share: float) -> None:
        raise AssertionError("trained although the cache holds the weights")

    again, same, kept = module.trained_model(*text, 30, 0, tmp_path, never)
    assert same == digest and kept == report
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40  # one bit of a weight
    file.write_bytes(content)
    with pytest.raises(AssertionError, match="trained although"):  # damaged: trains again
        module.trained_model(*text, 30, 0, tmp_path, never)
    with pytest.raises(ConfigError, match="--steps"):
        module.train(text[0], 0, 0, silent)


def stored(bench: Bench, values: dict[tuple[float | None, int], np.ndarray]) -> dict[str, Any]:
    """Rows of a result file: loss per window of (alpha, seed) at 100 %."""
    module = bench["language_model"]
    rows: dict[str, Any] = {}
    for (alpha, seed), losses in values.items():
        name = module.Row("text", "default", alpha, seed, (1.0,)).name
        rows[name] = {"ratios": [{"ratio": 1.0, "window_losses": module.pack(losses.astype(np.float32))}]}
    return rows


def test_losses_survive_packing(bench: Bench) -> None:
    losses = np.array([1.5, 0.1, 3e-7], np.float32)
    assert np.array_equal(bench["language_model"].unpack(bench["language_model"].pack(losses)), losses)


def test_differences_are_paired_by_window_and_seed(bench: Bench) -> None:
    module = bench["language_model"]
    rng = np.random.default_rng(0)
    base = rng.normal(1.5, 0.5, 400)  # windows differ by far more than the effect
    effect = {seed: 0.01 * (seed + 1) + rng.normal(0.0, 0.001, 400) for seed in (0, 1)}
    plain = {s: base + 0.1 * s for s in (0, 1, 2)}
    smoothed = {s: plain[s] + effect[s] for s in (0, 1)}
    mean, over_windows, over_seeds, n = module.paired(smoothed, plain)
    assert n == 2 and mean == pytest.approx(0.015, abs=0.0002)
    assert over_windows == pytest.approx(0.001 / math.sqrt(2) / math.sqrt(400), rel=0.2)
    assert over_seeds == pytest.approx(0.005, rel=0.1)  # standard deviation of 0.01 and 0.02 over sqrt(2)
    assert module.paired({3: base}, plain) is None


def test_tables_show_perplexity_and_relative_change(bench: Bench) -> None:
    module = bench["language_model"]
    base = np.full(50, math.log(4.0))
    rows = stored(
        bench, {(None, 0): base, (0.5, 0): base + math.log(0.9), (None, 1): base, (0.5, 1): base + math.log(0.9)}
    )
    lines = {line[0]: line[1:] for line in module.main_table(rows, "text")}
    assert lines["none"] == ["-", "-", "-", "-", "4.000"]
    assert lines["alpha 0.5"][-1] == "3.600"
    index = [line[0] for line in module.main_table(rows, "text")].index("alpha 0.5")
    assert module.main_table(rows, "text")[index + 1][-1].startswith("-10.00 ± 0.00")
    assert "alpha 0.3" not in lines


def test_rows_have_names_of_their_own_and_seeds_follow_each_other(bench: Bench) -> None:
    module = bench["language_model"]
    for network in ("text", "vit"):
        rows = module.rows_of(network, (0, 1, 2))
        assert len({row.name for row in rows}) == len(rows)
        plain = [row.seed for row in rows if row.variant == "default"]
        assert plain == sorted(plain) and rows[-1].seed == 2
        assert {row.alpha for row in rows} >= {None, 0.3, 0.5, 0.7} and rows[0].alpha is None
    assert {row.variant for row in module.rows_of("text", (0,))} == {"default", *module.VARIANTS}


def test_a_row_is_measured_end_to_end_and_found_again(
    bench: Bench, text: tuple[TextData, TextData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench["language_model"]
    monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    (tmp_path / "text").mkdir()
    words = text[0].vocabulary.decode(text[0].tokens) + text[1].vocabulary.decode(text[1].tokens)
    (tmp_path / "text" / "tinyshakespeare.txt").write_text(words, encoding="utf-8")
    monkeypatch.setattr(bench["language_model_training"], "char_transformer", tiny)
    parser = bench["common"].make_parser("language_model", "", ("text",), None)
    for option, value in (("--steps", 2), ("--training-seed", 0), ("--windows", 3)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--cache", type=Path, default=tmp_path)
    options = bench["common"].read_options(parser, ["--results", str(tmp_path / "results")], ("text",))
    run = module.TextRun(options)
    row = module.Row("text", "default", 0.5, 0, (0.0, 1.0))
    run.measure_all([row])
    found = module.TextRun(options)
    monkeypatch.setattr(found, "quantize_and_measure", None)  # a call would fail: the file has the row
    found.measure(row)
    entry = found.file.rows[row.name]
    assert [e["ratio"] for e in entry["ratios"]] == [0.0, 1.0]
    assert entry["ratios"][0]["perplexity"] == pytest.approx(math.exp(entry["ratios"][0]["loss"]))
    assert len(module.unpack(entry["ratios"][0]["window_losses"])) == 3
    assert entry["settings"]["config"]["smooth"] == 0.5 and entry["ratios"][1]["low_share"] > 0.5
    assert abs(entry["ratios"][0]["loss"] - found.file.rows["text.float32"]["loss"]) < 0.05


def test_missing_text_and_bad_options_are_named(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench["language_model"]
    monkeypatch.setattr(module, "data_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="tinyshakespeare"):
        module.main(["--networks", "text", "--results", str(tmp_path / "results")])
    for options, message in ((["--seeds", "4"], "--seeds"), (["--networks", "resnet20"], "--networks")):
        with pytest.raises(ConfigError, match=message):
            module.main([*options, "--results", str(tmp_path)])
