"""`effort="high"`: what tuning low weights may change, what it may not, and that it never makes held-out answers worse."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError, DataError
from bitdial.finetuning.low_tuning import Distance
from bitdial.pipeline import prepare, quantize_prepared, restore_means
from bitdial.pipeline.effort import Tuned, tune_low_weights, tuning_checkpoint, tuning_settings
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program

Subject = Any  # the named tuple of conftest.py: prepared, program, config, images
FEW = tuning_settings(0).updated(epochs=4, checkpoint_seconds=0, learning_rate=0.05)


def tuned(subject: Subject, **options: Any) -> Tuned:
    def restore(program: Program, indices: Any) -> None:
        restore_means(subject.prepared, program, subject.config, indices)

    given = {"progress": lambda stage, share: None, "settings": FEW, "updates": 60, **options}
    return tune_low_weights(subject.prepared, subject.program, restore, **given)


def same_layers(a: Program, b: Program) -> bool:
    return all(
        np.array_equal(x.bias, y.bias) and (x.low_weight is None or np.array_equal(x.low_weight, y.low_weight))
        for x, y in zip(a.layers.values(), b.layers.values(), strict=True)
    )


@pytest.fixture(scope="module")
def spoilt(conv_subject: Subject) -> Subject:
    """Bias rows that are off by several 8-bit steps of the outputs, so that there is something to learn."""
    program = copy.deepcopy(conv_subject.program)
    for layer in program.layers.values():
        if layer.low_weight is not None:
            length = np.sqrt((layer.weight.reshape(len(layer.weight), -1).astype(np.float64) ** 2).sum(axis=1))
            layer.bias[1:] += np.rint(4.0 * length).astype(np.int32)
    return conv_subject._replace(program=program)


@pytest.fixture(scope="module")
def tuned_conv(spoilt: Subject) -> Tuned:
    return tuned(spoilt)


def test_the_eight_bit_end_stays_to_the_bit(spoilt: Subject, tuned_conv: Tuned) -> None:
    before, after = spoilt.program, tuned_conv.program
    moved = 0
    for name, layer in before.layers.items():
        other = after.layers[name]
        for field in ("weight", "weight_scale", "multiplier", "weight_shift", "activation_shift", "low"):
            assert np.array_equal(getattr(layer, field), getattr(other, field)), (name, field)
        assert np.array_equal(layer.bias[0], other.bias[0])
        if layer.low_weight is not None:
            assert int(np.abs(other.low_weight).max()) <= layer.wmax
            moved += int((layer.low_weight != other.low_weight).sum())
    assert moved > 0 and tuned_conv.summary["kept"] == "tuned"
    engines = [ReferenceEngine(p) for p in (before, after)]
    assert torch.equal(*(e.run(spoilt.images, 0.0) for e in engines))
    assert not torch.equal(*(e.run(spoilt.images, 1.0) for e in engines))


@pytest.mark.parametrize("name", ["spoilt", "conv_subject", "transformer_subject"])
def test_held_out_distances_get_smaller_or_stay(name: str, tuned_conv: Tuned, request: pytest.FixtureRequest) -> None:
    told = (tuned_conv if name == "spoilt" else tuned(request.getfixturevalue(name))).summary
    assert told["held_out"] == 6 and told["samples"] == 26
    if name == "spoilt" or told["kept"] == "tuned":
        pairs = list(zip(told["tuned"], told["solved"], strict=True))
        assert all(own <= before for own, before in pairs) and any(own < before for own, before in pairs)
        kept = [bias == "solved" for bias in told["bias"]]
        assert all((own == before) or not stays for (own, before), stays in zip(pairs, kept, strict=True))


def test_training_that_makes_answers_worse_is_not_taken(conv_subject: Subject) -> None:
    wild = FEW.updated(learning_rate=50.0, keep="last")
    result = tuned(conv_subject, settings=wild)
    assert result.summary["kept"] == "solved" and same_layers(result.program, conv_subject.program)


def test_an_interrupted_tuning_ends_with_the_program_of_one_that_was_not(
    spoilt: Subject, tuned_conv: Tuned, tmp_path: Path
) -> None:
    path = tuning_checkpoint(tmp_path / "search.json")

    def stop(stage: str, share: float) -> None:
        if stage == "tune" and share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(spoilt, checkpoint=path, progress=stop)
    assert path.exists()
    shares: list[float] = []
    resumed = tuned(spoilt, checkpoint=path, progress=lambda stage, share: shares.append(share))
    assert shares[1] >= 0.5, "it went on in the middle"
    assert same_layers(resumed.program, tuned_conv.program)
    with pytest.raises(DataError, match="belongs to a run with other settings"):
        tuned(spoilt, checkpoint=path, settings=FEW.updated(learning_rate=1e-3))


def test_the_whole_way_and_its_provenance(conv_net: torch.nn.Module, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(tune_low_weights, updates=8)
    monkeypatch.setattr("bitdial.pipeline.quantizing.tune_low_weights", few)
    config = QuantizeConfig(
        target="paper", selector="greedy", ratios=(0.5, 1.0), batch_size=16, group_size=8, effort="high"
    )
    stages: list[str] = []
    images = helpers.images(20, seed=3)
    program = quantize_prepared(
        prepare(conv_net, [images], config), config, progress=lambda stage, share: stages.append(stage)
    )
    told = program.provenance["effort"]
    assert told["updates"] == 8 and told["ratios"] == [0.5, 1.0] and "tune" in stages and "answers" in program.provenance
    told = quantize_prepared(prepare(conv_net, [images[:6]], config), config).provenance["effort"]
    assert told["kept"] == "solved" and "6 calibration samples are too few" in told["reason"]


def test_high_effort_needs_stored_low_weights() -> None:
    for wrong in ({"low_weights": "derived"}, {"extraction": "naive"}):
        with pytest.raises(ConfigError, match="effort = 'high' tunes low weights that are stored"):
            QuantizeConfig(effort="high", **wrong)


def test_distances_are_of_soft_labels_or_of_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator).double() for _ in range(2))

    def labels(x: Tensor) -> Tensor:
        return torch.softmax(x / 4.0, dim=1)

    expected = 16.0 * float((labels(b) * (labels(b).log() - labels(a).log())).sum(dim=1).mean())
    assert float(Distance(True, 1.0, 4.0)(a, b)) == pytest.approx(expected)
    assert float(Distance(False, 2.0)(a, b)) == pytest.approx(float(((a - b) ** 2).mean()) / 2.0)
