"""The language model through capture and quantization: integers in, finite logits out, and no look into the future."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitdial
from bitdial.benchmarking.perplexity import token_loss
from bitdial.errors import ConfigError
from bitdial.quantization.config import QuantizeConfig
from language.char_transformer import CharTransformer, char_transformer

VOCABULARY, CONTEXT = 12, 16
CONFIG = QuantizeConfig(target="paper", group_size=8, ratios=(0.0, 0.5, 1.0), selector="greedy", smooth=0.5, search_images=8)


def tokens(n: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> CharTransformer:
    """Random weights with channels of uneven range, as training makes them."""
    torch.manual_seed(0)
    made = CharTransformer(VOCABULARY, dim=32, depth=2, heads=2, context=CONTEXT)
    with torch.no_grad():
        made.embedding.weight.mul_(20.0)
        for name, p in made.named_parameters():
            if "norm" in name:
                p.mul_(torch.exp(0.7 * torch.randn(p.shape))).add_(0.1 * torch.randn(p.shape))
    return made.eval()


@pytest.fixture(scope="module")
def quantized(model: CharTransformer) -> bitdial.api.QuantizedModel:
    return bitdial.quantize(model, tokens(32, 1), CONFIG, engine="reference")


def test_the_float_model_is_causal_and_checks_its_context(model: CharTransformer) -> None:
    x = tokens(4, 2)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCABULARY
    with torch.inference_mode():
        a, b, short = model(x), model(changed), model(x[:, :9])
    assert a.shape == (4, CONTEXT, VOCABULARY)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-5)
    torch.testing.assert_close(a[:, :9], short, rtol=0, atol=1e-5)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(dim=(1, 2)).min() > 0.01
    with pytest.raises(ConfigError, match="context of 16"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.int64))
    for sizes in ({"dim": 30, "heads": 4}, {"depth": 0}):
        with pytest.raises(ConfigError):
            CharTransformer(VOCABULARY, **sizes)


def test_the_default_has_the_stated_size() -> None:
    assert sum(p.numel() for p in char_transformer().parameters()) == 826_433


def test_every_ratio_is_finite_and_lowering_costs(model: CharTransformer, quantized, helpers) -> None:
    x = tokens(32, 3)
    with torch.inference_mode():
        exact = model(x)
    quality = {}
    for index, ratio in enumerate(quantized.ratios):
        out = torch.as_tensor(quantized(x, ratio))
        assert out.shape == exact.shape and bool(torch.isfinite(out).all())
        assert quantized.program.eligible_share(index) == pytest.approx(ratio, abs=0.06)
        quality[ratio] = helpers.snr(exact, out)
    assert quality[0.0] > 25.0 > quality[1.0] > 5.0
    assert quality[0.0] > quality[0.5] > quality[1.0]


def test_lookup_norms_and_softmax_are_float_and_the_products_integer(quantized) -> None:
    program = quantized.program
    ops = {program.graph.node(name).op for name in program.float_reasons}
    assert {"aten.embedding.default", "layer_norm", "softmax"} <= ops
    assert len(program.layers) == 2 * 6 + 1  # per block four linear layers and two products of attention; the head
    assert sum(layer.eligible for layer in program.layers.values()) == 2 * 4 - 1  # not the first one, nor the head


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_quantized_answers_depend_on_nothing_later_and_on_no_other_sample(quantized, ratio: float) -> None:
    """Exact in integers, for shifts are fixed: what is summed differs in float only where tokens differ."""
    x = tokens(6, 4)
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 5) % VOCABULARY
    a, b = (torch.as_tensor(quantized(v, ratio)) for v in (x, changed))
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])
    torch.testing.assert_close(torch.as_tensor(quantized(x[2:3], ratio)), a[2:3], rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(quantized, tmp_path: Path) -> None:
    path = tmp_path / "language.bitdial"
    quantized.save(path)
    loaded = bitdial.load(path, engine="reference")
    x = tokens(4, 5)
    for ratio in quantized.ratios:
        assert torch.equal(torch.as_tensor(loaded(x, ratio)), torch.as_tensor(quantized(x, ratio)))


def test_evaluate_takes_the_loss_as_metric(quantized) -> None:
    x = tokens(8, 6)
    batches = [(x[:4, :], x[:4].roll(-1, 1)), (x[4:], x[4:].roll(-1, 1))]
    rows = quantized.evaluate(batches, metric=token_loss)
    for row in rows:
        direct = token_loss(torch.as_tensor(quantized(x, row["ratio"])), x.roll(-1, 1))
        assert row["accuracy"] == pytest.approx(direct, rel=1e-6)


def test_channels_are_sorted_through_the_embedding(model: CharTransformer) -> None:
    from bitdial.api import prepare_model
    from bitdial.graph.interpreter import run_graph

    x = tokens(8, 3)
    prepared = prepare_model(model, x, CONFIG.updated(smooth=None))
    assert prepared.layout is not None
    assert prepared.layout.frozen == () and prepared.layout.n_reorders == 0
    tables = [n.inputs[0] for n in prepared.graph.nodes if n.op == "aten.embedding.default"]
    original = model.embedding.weight.detach().numpy()
    assert any(
        prepared.graph.constants[t].shape == original.shape and not (prepared.graph.constants[t] == original).all()
        for t in tables
    ), "the table's columns follow the residual stream's order"
    with torch.no_grad():
        assert torch.allclose(run_graph(prepared.graph, [x])[0], model(x), atol=1e-4)
