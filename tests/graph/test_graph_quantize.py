"""Tricky modules all the way through: quantized at every ratio, saved, loaded, one sample or many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import bitdial

NAMES = [
    "shared weights",
    "gram matrix",
    "split and chunk",
    "channel shuffle",
    "same padding, even",
    "conv transpose",
    "squeeze-excite",
    "torch attention, time first",
    "attention mask at run time",
    "shifted windows",
    "pre-activation",
    "embedding",
    "dict and tuple outputs",
    "two inputs",
]


def outputs(value: Any) -> list[Tensor]:
    return _pytree.tree_leaves(value)


@pytest.mark.parametrize("name", NAMES)
def test_from_module_to_file_and_back(
    name: str, case_maker: Callable[[str], Any], helpers: Any, tmp_path: Path
) -> None:
    make_model, make_inputs = case_maker(name)
    torch.manual_seed(0)
    model, inputs = make_model().eval(), make_inputs(24)
    config = bitdial.QuantizeConfig(
        target="paper", selector="greedy",
        group_size=2,
        ratios=(0.5, 1.0),
        extraction="dynamic" if len(name) % 2 else "static",
        lower_first_last=True,
        lower_depthwise=True,
        calibration_images=24,
        search_images=8,
    )
    qm = bitdial.quantize(model, [inputs], config)
    assert any(layer.low[-1].any() for layer in qm.program.layers.values())

    def batch(rows: slice) -> Any:
        parts = [x[rows] for x in inputs]
        return parts if len(parts) > 1 else parts[0]

    with torch.no_grad():
        exact = [v for v in _pytree.tree_leaves(model(*inputs)) if isinstance(v, Tensor)]
    for ratio in qm.ratios:
        got = outputs(qm(batch(slice(None)), ratio=ratio))
        assert len(got) == len(exact)
        for want, have in zip(exact, got, strict=True):
            assert want.shape == have.shape and want.dtype == have.dtype
            assert helpers.snr(want, have) > (25.0 if ratio == 0.0 else 8.0)
        alone = [outputs(qm(batch(slice(i, i + 1)), ratio=ratio)) for i in range(3)]
        together = outputs(qm(batch(slice(0, 3)), ratio=ratio))
        for position, value in enumerate(together):
            torch.testing.assert_close(torch.cat([a[position] for a in alone]), value, rtol=0, atol=1e-5)
    file = tmp_path / "model.bitdial"
    qm.save(file)
    loaded = bitdial.load(file)
    for ratio in qm.ratios:
        first, second = outputs(qm(batch(slice(None)), ratio=ratio)), outputs(loaded(batch(slice(None)), ratio=ratio))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
