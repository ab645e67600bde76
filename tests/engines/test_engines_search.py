"""The search's evaluator: its distances equal those of a plain loop, whatever the prefix tree and the cache do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdial import QuantizeConfig
from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.labels import Labels
from bitdial.engines.reference.search import CHUNK, CandidateEvaluator
from bitdial.engines.reference.walk import Batches, TorchWalk
from bitdial.pipeline import Prepared, choose, eight_bit_program, low_tables, prepare, quantizing
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program

Made = tuple[Program, list[str], list[Tensor], dict[str, np.ndarray]]
IMAGES = CHUNK + 6  # more than one chunk


def make(model: Any, inputs: Tensor, **settings: Any) -> Made:
    config = QuantizeConfig(target="paper", group_size=8, calibration_images=IMAGES, **settings)
    prepared: Prepared = prepare(model, [inputs], config)
    program = eight_bit_program(prepared, config)
    tables = low_tables(prepared, program, config)
    layers = [n for n, layer in program.layers.items() if layer.eligible]
    return program, layers, prepared.inputs, tables.mean_shifts


@pytest.fixture(scope="module", params=["conv", "transformer", "dynamic", "uncorrected"])
def made(request: pytest.FixtureRequest, conv_net: Any, transformer: Any, helpers: Any) -> Made:
    x = helpers.images(IMAGES, seed=9)
    if request.param == "transformer":
        return make(transformer, x)
    if request.param == "dynamic":
        return make(conv_net, x, extraction="dynamic")
    return make(conv_net, x, bias_correction=request.param == "conv")


def candidates(program: Program, layers: list[str], n: int, seed: int = 0) -> np.ndarray:
    """Masks that share prefixes: each takes the genes of an earlier one up to some layer."""
    rng = np.random.default_rng(seed)
    sizes = [program.layers[name].n_groups for name in layers]
    masks = rng.random((n, sum(sizes))) < 0.5
    for i in range(1, n):
        cut = sum(sizes[: int(rng.integers(0, len(sizes) + 1))])
        masks[i, :cut] = masks[rng.integers(0, i), :cut]
    masks[0], masks[-1] = False, True
    return masks


def naive(made: Made, mask: np.ndarray, n_images: int) -> float:
    """One candidate by the exact executor: 8-bit biases plus the first-order shifts of its low groups."""
    program, layers, inputs, shifts = made
    executor = Executor(program)
    base, settings, start = executor.settings(0), executor.settings(0), 0
    for name in layers:
        n = program.layers[name].n_groups
        own = mask[start : start + n]
        start += n
        bias = program.layers[name].bias[0].astype(np.float64)
        if name in shifts and own.any():
            bias = np.rint(bias + shifts[name][own].sum(axis=0))
        settings[name] = executor.layers[name].setting(torch.from_numpy(own.copy()), torch.from_numpy(bias))
    batch = [x[:n_images] for x in inputs]
    with torch.no_grad():
        a = torch.softmax(executor.run(batch, base)[0].double(), -1)
        b = torch.softmax(executor.run(batch, settings)[0].double(), -1)
    return float(np.sqrt(float((a - b).pow(2).sum()) / n_images))


def test_distances_are_those_of_a_plain_loop(made: Made) -> None:
    program, layers, inputs, shifts = made
    evaluator = CandidateEvaluator(program, layers, inputs, shifts)
    masks = candidates(program, layers, 10)
    for n_images in (5, CHUNK, CHUNK + 3, IMAGES):
        got = evaluator(masks, n_images)
        expected = [naive(made, m, n_images) for m in masks]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert got[0] == 0.0 and got[-1] > 0.0
    assert (evaluator(masks) == evaluator(masks, IMAGES)).all()
    assert (evaluator(masks, 10 * IMAGES) == evaluator(masks, IMAGES)).all()


def test_cache_and_order_change_nothing(made: Made) -> None:
    program, layers, inputs, shifts = made
    cached = CandidateEvaluator(program, layers, inputs, shifts)
    bare = CandidateEvaluator(program, layers, inputs, shifts, cache_limit=0)
    masks = candidates(program, layers, 8, seed=1)
    first, again = cached(masks, IMAGES), cached(masks[::-1], IMAGES)[::-1]
    plain = bare(masks, IMAGES)
    assert (first == again).all() and (first == plain).all()
    assert (np.array([cached(m[None], IMAGES)[0] for m in masks]) == first).all()
    assert cached.statistics.cache_hits > 0 and bare.statistics.cache_hits == 0 and not bare.cache
    assert bare.statistics.cache_bytes == 0
    assert cached.statistics.evaluations == 8 * 3 and cached.statistics.images == 24 * IMAGES
    summary = cached.statistics.summary()
    assert 0 < summary["multiplies_saved_share"] < 1
    assert summary["multiplies"] < bare.statistics.multiplies * 3


def test_multiplies_are_counted(made: Made) -> None:
    """Executed and saved add up to what every candidate alone would take, and the plain ones are the network's own."""
    program, layers, inputs, shifts = made
    evaluator = CandidateEvaluator(program, layers, inputs, shifts, cache_limit=0)
    masks = candidates(program, layers, 6, seed=2)
    evaluator(masks, IMAGES)
    whole = sum(layer.macs for layer in program.layers.values()) * IMAGES
    statistics = evaluator.statistics
    assert statistics.multiplies + statistics.saved == 6 * whole and statistics.multiplies > whole
    alone = CandidateEvaluator(program, layers, inputs, shifts, cache_limit=0)
    alone(masks[:1], IMAGES)
    assert (alone.statistics.multiplies, alone.statistics.saved) == (whole, 0)


def test_cache_limit_is_kept(made: Made) -> None:
    program, layers, inputs, shifts = made
    full = CandidateEvaluator(program, layers, inputs, shifts)
    masks = candidates(program, layers, 12, seed=3)
    expected = full(masks, IMAGES)

    def held(evaluator: CandidateEvaluator) -> int:
        return sum(x.numel() * x.element_size() for entry in evaluator.cache.values() for x in entry.values())

    assert held(full) == full.statistics.cache_bytes > 0
    limit = full.statistics.cache_bytes // 3
    small = CandidateEvaluator(program, layers, inputs, shifts, cache_limit=limit)
    for mask, distance in zip(masks, expected, strict=True):
        assert small(mask[None], IMAGES)[0] == distance
        assert held(small) == small.statistics.cache_bytes <= limit
    assert 0 < len(small.cache) < len(full.cache)


def test_deviation_from_the_exact_engine_is_tiny(made: Made) -> None:
    program, layers, inputs, shifts = made
    evaluator = CandidateEvaluator(program, layers, inputs, shifts)
    report = evaluator.deviation(candidates(program, layers, 4))
    assert report["candidates"] == 4 and report["images"] == CHUNK
    assert 0.0 <= report["largest_soft_label_difference"] < 1e-4


def test_evaluation_changes_nothing_in_the_program(made: Made) -> None:
    program, layers, inputs, shifts = made
    before = {n: (layer.bias.copy(), layer.low.copy()) for n, layer in program.layers.items()}
    images = [x.clone() for x in inputs]
    CandidateEvaluator(program, layers, inputs, shifts)(candidates(program, layers, 3))
    for name, (bias, low) in before.items():
        assert (program.layers[name].bias == bias).all() and (program.layers[name].low == low).all()
    assert all(torch.equal(a, b) for a, b in zip(images, inputs, strict=True))


def test_outputs_per_token_and_without_classes() -> None:
    """Distances count every token of the images asked for; a single output is compared as it is."""
    torch.manual_seed(0)
    tokens = torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)
    )
    x = torch.randn(IMAGES, 4, 6)
    one = make(tokens, x)
    evaluator = CandidateEvaluator(*one[:2], one[2], one[3])
    masks = candidates(one[0], one[1], 4)
    for n_images in (7, IMAGES):
        np.testing.assert_allclose(
            evaluator(masks, n_images), [naive(one, m, n_images) for m in masks], rtol=1e-4, atol=1e-7
        )


def test_outputs_are_scores_of_classes_or_numbers() -> None:
    """An embedding has no soft labels: its distances are of its numbers, 1 as far as another sample's output."""
    generator = torch.Generator().manual_seed(0)
    assert Labels.of(torch.zeros(2, 4))(torch.zeros(2, 4)).tolist() == [[0.25] * 4] * 2
    scores = torch.randn(8, 1000, generator=generator) * 4
    assert Labels.of(scores).classes and Labels.of(scores[:, :10] * 0.01).classes
    embeddings = torch.randn(400, 384, generator=generator)
    for outputs in (embeddings, torch.nn.functional.normalize(embeddings, dim=1), embeddings[:, :1], embeddings[:, 0]):
        labels = Labels.of(outputs)
        assert not labels.classes
        moved = (labels(outputs) - labels(outputs.roll(1, dims=0))).double().square().reshape(400, -1).sum(dim=1).mean()
        assert float(moved) == pytest.approx(2.0, rel=0.2)
    assert Labels.of(torch.ones(5))(torch.ones(5)).tolist() == [1.0] * 5  # outputs that do not differ have no spread


def test_token_ids_survive_the_cache() -> None:
    """Integer inputs that are still alive in a remembered prefix stay integers."""

    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Embedding(9, 16), torch.nn.Embedding(9, 16)
            self.linears = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(6))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.a(ids)
            for linear in self.linears[:-1]:
                x = torch.relu(linear(x))
            out: Tensor = self.linears[-1](x + self.b(ids))
            return out

    torch.manual_seed(0)
    made = make(Late(), torch.randint(0, 9, (IMAGES, 3)))
    evaluator = CandidateEvaluator(made[0], made[1], made[2], made[3])
    masks = candidates(made[0], made[1], 5)
    first = evaluator(masks)
    assert (evaluator(masks) == first).all() and evaluator.statistics.cache_hits > 0


def test_progress_and_passes(conv_net: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every long stage tells its share, rising; values, histograms and samples come from one pass over the data."""
    passes: list[int] = []
    layers = TorchWalk.layers

    def counted(self: TorchWalk, index: int, batches: Batches) -> Iterator[Contract]:
        passes.extend(len(batch[0]) for batch in batches)
        return layers(self, index, batches)

    monkeypatch.setattr(TorchWalk, "layers", counted)
    monkeypatch.setattr(quantizing, "walk_of", TorchWalk)
    config = QuantizeConfig(target="paper", group_size=8, calibration_images=20, batch_size=5, selector="greedy", search="exact")
    prepared = prepare(conv_net, [helpers.images(20, seed=9)], config)
    program = eight_bit_program(prepared, config)
    seen: list[tuple[str, float]] = []
    passes.clear()
    tables = low_tables(prepared, program, config, lambda stage, share: seen.append((stage, share)))
    assert passes == [5, 5, 5, 5]
    chosen = choose(prepared, program, tables, config, progress=lambda stage, share: seen.append((stage, share)))
    assert chosen.statistics["cache_lookups"] == 0  # nothing is scored twice, so nothing is remembered
    for stage in ("values", "shifts", "sensitivity"):
        shares = [share for name, share in seen if name == stage]
        assert len(shares) >= 4 and shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == pytest.approx(1.0)
