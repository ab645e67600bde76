"""A network whose low end is useless, from quantizing to serving: warned of, stored, shown, and not used by default."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastapi", reason="THE SERVER IS NOT TESTED: fastapi is not installed")
pytest.importorskip("uvloop", reason="THE SERVER IS NOT TESTED: uvloop is not installed")

from served import http, serving, write_table

import bitdial
from bitdial import QuantizeConfig, QuantizedModel
from bitdial.artifact import from_bytes, load_program, to_bytes
from bitdial.cli import main
from bitdial.cli.report import build_report
from bitdial.errors import ArtifactError, LostAnswersWarning
from bitdial.quantization.answers import OUTPUTS, TOP_ANSWERS, kept_answers
from bitdial.report.data import ReportData
from bitdial.report.page import render_html
from bitdial.serving.worker.thread import ThreadWorker

RATIOS = (0.0, 0.5, 1.0)


class Net(nn.Module):
    """The second layer may run low. `outlier`: in one of its two groups answers lie in weights a twentieth as large as others,
    which all outputs share, so that 8 bits hold them and 4 do not."""

    def __init__(self, outlier: bool, outputs: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, outputs)
        if outlier:
            with torch.no_grad():
                self.second.weight[:, 16::4] = 20 * self.second.weight.abs().max()
                self.last.weight -= self.last.weight.mean(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return out


SAMPLES = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
CONFIG = QuantizeConfig(target="paper", ratios=RATIOS, selector="greedy", sort_channels=False, low_weights="derived")


def quantized(model: nn.Module, config: QuantizeConfig = CONFIG) -> tuple[QuantizedModel, list[str]]:
    """The model, and what quantizing warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = bitdial.quantize(model.eval(), SAMPLES, config, engine="reference")
    return result, [str(w.message) for w in caught if w.category is LostAnswersWarning]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.manual_seed(3)
    model, told = quantized(Net(outlier=True))
    path = tmp_path_factory.mktemp("ceiling") / "bad.bitdial"
    model.save(path)
    yield SimpleNamespace(model=model, told=told, path=path)


def test_quantizing_tells_of_ratios_that_lose_the_answers(bad: Any) -> None:
    kept = kept_answers(bad.model.program)
    assert kept is not None and kept.by == TOP_ANSWERS and kept.samples == 256 and kept.wanted == 0.97
    base = bad.model(SAMPLES, 0.0).argmax(1)
    for ratio, share in zip(RATIOS, kept.kept, strict=True):  # of the finished program, by its engine
        assert share == pytest.approx(float((bad.model(SAMPLES, ratio).argmax(1) == base).double().mean()))
    assert kept.ceiling == 0.5 and kept.kept[-1] < 0.9
    (text,) = bad.told
    assert f"{100 * kept.kept[-1]:.4g} % at 100 %" in text and "97 %" in text and f" {100 * kept.ceiling:g} %" in text
    assert "--max-ratio" in text and "low_bits, up to 7" in text


def test_a_sound_network_is_not_complained_of() -> None:
    torch.manual_seed(3)
    model, told = quantized(Net(outlier=False), CONFIG.updated(low_bits=6))
    kept = kept_answers(model.program)
    assert told == [] and kept is not None and kept.ceiling == 1.0 and min(kept.kept) > 0.97
    torch.manual_seed(3)
    model, told = quantized(Net(outlier=True), CONFIG.updated(keep_answers=0.0))
    assert told == [] and kept_answers(model.program).ceiling == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("correction", [True, False])
def test_outputs_without_classes_are_compared_as_values(correction: bool) -> None:
    torch.manual_seed(3)
    config = CONFIG.updated(low_bits=2, bias_correction=correction)
    model, told = quantized(Net(outlier=False, outputs=1), config)
    kept = kept_answers(model.program)
    assert kept is not None and kept.by == OUTPUTS and len(told) == 1
    exact, low = (model(SAMPLES, r).double().numpy() for r in (0.0, 1.0))
    spread = ((exact - exact.mean(0)) ** 2).sum() + ((low - exact.mean(0)) ** 2).sum()
    assert kept.kept[-1] == pytest.approx(1.0 - ((exact - low) ** 2).sum() / spread)
    rows = model.evaluate([(SAMPLES, None)])
    assert [row["agreement"] for row in rows] == [None] * 3 and rows[-1]["distance"] > 0  # no classes: no top answer


def test_constant_outputs_say_nothing() -> None:
    torch.manual_seed(3)
    net = Net(outlier=False)
    with torch.no_grad():
        net.last.weight.zero_()
    model, told = quantized(net)
    assert told == [] and kept_answers(model.program) is None


def test_the_record_survives_the_file_and_is_checked_on_load(bad: Any, tmp_path: Path) -> None:
    loaded = load_program(bad.path)
    kept = kept_answers(loaded)
    assert kept == kept_answers(bad.model.program) and kept is not None
    bad.model.save(tmp_path / "band.bitdial", band=(0.5, 1.0))
    band = kept_answers(load_program(tmp_path / "band.bitdial"))
    assert band is not None and band.ratios == (0.5, 1.0) and band.kept == kept.kept[1:] and band.ceiling == 0.5
    for change in ({"kept": [1.0, 2.0, 0.0]}, {"ratios": [0.0, 0.25, 1.0]}, {"ceiling": "0.5"}, {"samples": -1}, {"x": {}}):
        damaged = from_bytes(bad.path.read_bytes())
        damaged.provenance["answers"] = {**damaged.provenance["answers"], **change}
        with pytest.raises(ArtifactError, match="kept answers"):
            to_bytes(damaged)


def test_inspect_and_the_report_show_it(bad: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kept = kept_answers(bad.model.program)
    assert kept is not None and main(["inspect", str(bad.path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"useful up to {100 * kept.ceiling:g} %" in out and f"{100 * kept.kept[-1]:.4g} % at 100 %" in out
    data = build_report(load_program(bad.path), "bad")
    assert ReportData.from_json(data.to_json()) == data
    page = render_html(data).replace("\u00a0", " ")
    assert "Which ratios are of use" in page and f"Useful up to {100 * kept.ceiling:g} %" in page


def test_serving_stops_at_the_ceiling_unless_told_otherwise(
    bad: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = kept_answers(bad.model.program)
    assert kept is not None
    tables = {"m": write_table(tmp_path / "t", (0.01, 0.005, 0.002), RATIOS)}
    tensor = {"name": bad.model.program.graph.inputs[0], "shape": [2, 16], "datatype": "FP32", "data": [0.5] * 32}
    text = json.dumps({"inputs": [tensor]}).encode()
    question = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)

    def asked(**options: Any) -> tuple[dict[str, Any], float]:
        # fixed:1 wants to go as far as it may.
        models = {"m": bad.path}
        with serving(models, tables, ThreadWorker, policy="fixed:1", engine="reference", slo_ms=5000, **options) as running:
            found = [
                json.loads(http(running.port, sent).partition(b"\r\n\r\n")[2])["parameters"]
                for sent in (b"GET /v2/models/m HTTP/1.1\r\nHost: x\r\n\r\n", question)
            ]
            return found[0], found[1]["ratio"]

    with caplog.at_level(logging.INFO, "bitdial.serving"):
        told, ratio = asked()
    assert (told["max_ratio"], told["max_ratio_from"], ratio) == (kept.ceiling, "model file", kept.ceiling)
    assert f"up to {100 * kept.ceiling:g} %, the ceiling in the model file" in caplog.text and "--max-ratio" in caplog.text
    told, ratio = asked(max_ratio=1.0)
    assert (told["max_ratio"], told["max_ratio_from"], ratio) == (1.0, "", 1.0)
