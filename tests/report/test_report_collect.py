"""From a program to the report's data: counts are checked against plain loops over the program."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import bitdial
from bitdial.errors import DataError
from bitdial.quantization.program import Program
from bitdial.report.collect import collect_report, float_layer_macs, low_share_of_all, unused_weight_bits
from bitdial.report.data import ReportData
from bitdial.report.page import render_html
from bitdial.report.series import largest_disagreement


class Net(nn.Module):
    """A grouped convolution, signed activations, and a layer to leave in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 48, 3, padding=1, groups=2)
        self.left_in_float = nn.Conv2d(48, 40, 1)
        self.inner = nn.Conv2d(40, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = self.left_in_float(self.grouped(x))
        return self.head(torch.relu(self.inner(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    config = bitdial.QuantizeConfig(
        target="paper", selector="greedy", group_size=8, ignored=("left_in_float",), calibration_images=8
    )
    images = torch.randn(8, 3, 6, 6)
    quantized = bitdial.quantize(Net().eval(), images, config, evaluation=[(images, torch.arange(8) % 5)])
    return quantized.program


@pytest.fixture(scope="module")
def data(program: Program) -> ReportData:
    rows = [{"label": "float32", "accuracy": 0.5}, {"label": "naive 4-bit", "accuracy": 0.25, "ratio": 1.0}]
    return collect_report(program, title="t", model="net", baselines=rows, created="2026-01-01T00:00:00+00:00")


def test_everything_is_rendered_and_survives_json(data: ReportData) -> None:
    assert ReportData.from_json(data.to_json()) == data
    page = render_html(data)
    assert "naive 4-bit" in page and "left_in_float" in page and "Do not trust" not in page


def test_float_layers_count_among_all_multiplies(program: Program, data: ReportData) -> None:
    in_float = float_layer_macs(program)
    assert list(in_float.values()) == [48 * 40 * 36]
    total = sum(layer.macs for layer in program.layers.values()) + 48 * 40 * 36
    for index, point in enumerate(data.curve):
        low = sum(
            int(macs)
            for layer in program.layers.values()
            for macs, is_low in zip(layer.group_macs, layer.low[index], strict=True)
            if is_low
        )
        assert point.low_share == pytest.approx(low / total)
        assert low_share_of_all(program, index) == point.low_share
    gap = largest_disagreement(data)
    assert gap is not None and gap < 1e-12
    layer = next(layer for layer in data.layers if layer.source == "left_in_float")
    assert layer.float_reason and layer.macs == 48 * 40 * 36 and not layer.eligible and layer.shape == "40x48x1x1"


def test_unused_bits_are_those_of_a_plain_loop(program: Program, data: ReportData) -> None:
    shown = {layer.name: layer for layer in data.layers}
    assert any(layer.conv_groups > 1 for layer in program.layers.values())
    for name, layer in program.layers.items():
        assert layer.weight is not None
        rows = layer.weight.shape[0]
        width = layer.weight.shape[1]
        expected: dict[int, int] = {}
        for o in range(rows):
            offset = o // (rows // layer.conv_groups) * width
            for a, b in zip(layer.group_bounds, layer.group_bounds[1:], strict=False):
                if a >= offset and b <= offset + width:
                    largest = int(np.abs(layer.weight[o, a - offset : b - offset].astype(int)).max())
                    bits = 7 - largest.bit_length()
                    expected[bits] = expected.get(bits, 0) + 1
        blocks = sum(expected.values())
        assert blocks == layer.weight_shift.size
        assert unused_weight_bits(layer) == pytest.approx({k: v / blocks for k, v in expected.items()})
        signed = program.qparams[program.graph.node(name).inputs[0]].signed
        assert shown[name].signed == signed
        ranges = program.provenance["channel_ranges"][name]
        counts: dict[int, int] = {}
        for a, b in zip(layer.group_bounds, layer.group_bounds[1:], strict=False):
            bits = (7 if signed else 8) - int(max(ranges[a:b])).bit_length()
            counts[bits] = counts.get(bits, 0) + 1
        expected_shares = {k: v / layer.n_groups for k, v in counts.items()}
        assert shown[name].unused_bits_activations == pytest.approx(expected_shares)


def test_measured_rows_replace_the_stored_ones(program: Program) -> None:
    rows = [{"ratio": 0.5, "accuracy": 0.75, "agreement": 0.5, "distance": 0.1, "samples": 12}]
    saturated = [{"layer": name, "ratio": 0.5, "saturated": 1, "total": 10} for name in list(program.layers)[1:2]]
    data = collect_report(program, title="t", curve=rows, saturation=saturated)
    assert [point.accuracy for point in data.curve] == [0.75] and data.n_images == 12
    assert data.saturation[0].layer == "grouped"
    assert collect_report(program, title="t", curve=[]).curve == ()


def test_a_file_without_history_still_has_a_report(program: Program) -> None:
    bare = dataclasses.replace(program, provenance={}, curve=[])
    data = collect_report(bare, title="t")
    assert data.curve == () and data.search.history == ()
    assert all(not layer.channel_ranges for layer in data.layers)
    assert render_html(data)


def test_rows_that_hold_something_else_are_refused(program: Program) -> None:
    with pytest.raises(DataError, match="accuracy"):
        collect_report(program, title="t", curve=[{"ratio": 0.5, "accuracy": 75.0}])
