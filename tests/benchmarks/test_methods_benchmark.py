"""The comparison of methods: rows, options and tables. Figures here are made up."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bitdial.errors import ConfigError

MODULES = (
    "machine", "results", "common", "measure", "accuracy_rows", "accuracy_table", "finetuning", "scores", "sentence_encoder",
    "real_networks_data", "methods_rows", "methods_table", "methods",
)  # fmt: skip


def row(bench: dict[str, ModuleType], seed: int, right: list[bool], reached: float = 5.0) -> dict[str, Any]:
    flags = np.array(right)
    point = {
        "asked": 5.0, "reached": reached, "accuracy": float(flags.mean()), "to_float": 0.0, "to_float_standard_error": 0.01,
        "correct": bench["measure"].pack_flags(flags),
    }  # fmt: skip
    switching = {"how": "fixed", "cost": "", "bytes": 2048, "in_time": False}
    return {"seed": seed, "samples": len(right), "points": [point], "prepare_seconds": 3.0, "switching": switching}


def test_rows_have_their_own_names_and_trained_ones_need_epochs(bench: dict[str, ModuleType]) -> None:
    rows = bench["methods_rows"]
    names = [r.name for r in rows.all_rows()]
    assert len(set(names)) == len(names) and {"bitdial", "uniform", "ptmq", "robust", "any_precision"} <= set(names)
    assert not any(r.trained for r in rows.choose_rows(None, False))
    assert any(r.trained for r in rows.choose_rows(None, True))
    with pytest.raises(ConfigError, match="robust trains: give --epochs"):
        rows.choose_rows("bitdial,robust", False)
    with pytest.raises(ConfigError, match="nothing does not exist"):
        rows.choose_rows("nothing", True)


def test_options_out_of_range_are_refused(bench: dict[str, ModuleType]) -> None:
    for arguments, message in (
        (["--seeds", "0"], "--seeds is 0"), (["--epochs", "-1"], "--epochs is -1"),
        (["--averages", "4,7"], "--averages: 7 is not"), (["--networks", "minilm_l6"], "--networks: minilm_l6 is not"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            bench["methods"].main([*arguments, "--list"])


def test_photographs_come_in_small_batches(bench: dict[str, ModuleType]) -> None:
    samples = bench["measure"].Samples(np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5), 2)
    parts = list(bench["common"].batches(samples))
    assert [len(x) for x, _ in parts] == [2, 2, 1] and len(samples) == 5
    assert torch.cat([x for x, _ in parts]).flatten().tolist() == list(range(10))
    assert np.concatenate([labels for _, labels in parts]).tolist() == list(range(5))


def test_what_a_program_does_not_say_is_run_by_its_own_engine(bench: dict[str, ModuleType]) -> None:
    """And is neither taken from, nor left to, what is remembered of programs."""

    class Constant:
        def run(self, x: torch.Tensor, ratio: float) -> torch.Tensor:
            return torch.full((len(x), 3), ratio)

    samples = bench["measure"].Samples(np.zeros((5, 2), np.float32), np.zeros(5, np.int64), 2)
    test_bench = bench["measure"].TestBench(torch.nn.Identity(), samples)
    outputs, now = test_bench.outputs(None, 0.5, None, Constant())
    assert now and outputs.shape == (5, 3) and (outputs == 0.5).all() and not test_bench._kept


def test_tables_pair_images_and_show_what_was_reached(bench: dict[str, ModuleType]) -> None:
    table = bench["methods_table"]
    rows = {
        "bitdial": row(bench, 0, [True, True, True, False]),
        "bitdial.seed1": row(bench, 1, [True, True, True, True]),
        "hawq": row(bench, 0, [True, False, True, False], 4.9),
        "hawq.seed1": row(bench, 1, [True, False, True, True], 4.9),
        "uniform": row(bench, 0, [False, False, True, True]),
    }
    seeds = (0, 1)
    own, other = table.measured(rows, "bitdial", seeds), table.measured(rows, "hawq", seeds)
    mean, error = table.difference(own, other, 5.0)
    assert mean == pytest.approx(0.25) and error == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    assert table.difference(own, other, 6.0) is None
    assert table.accuracy_cell(own, 5.0) == "87.50 ± 12.50"
    assert table.accuracy_cell(other, 5.0) == "62.50 ± 12.50 (4.90)"
    lines = {line[0]: line for line in table.table_rows(rows, seeds)}
    assert lines["uniform"][2] == "50.00*" and lines["HAWQ-style"][2] == "62.50 ± 12.50 (4.90)"
    assert lines["bitdial"][-1] == "2" and lines["bitdial"][1] == "-"
    gaps = {line[0]: line[2] for line in table.gap_rows(rows, seeds)}
    assert gaps["HAWQ-style"].startswith("+25.00 ±") and gaps["uniform"].startswith("+25.00 ±")
    assert "| HAWQ-style |" in table.markdown("resnet20", rows, seeds, "note")
