"""Perplexity: against values known in closed form, and against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdial.benchmarking.perplexity import perplexity, sequence_losses, token_loss
from bitdial.errors import DataError


@given(st.integers(2, 50), st.floats(-20, 20))
def test_equal_logits_have_the_vocabulary_as_perplexity(vocabulary: int, level: float) -> None:
    outputs = torch.full((3, 4, vocabulary), level)
    targets = torch.randint(0, vocabulary, (3, 4))
    assert perplexity(token_loss(outputs, targets)) == pytest.approx(vocabulary, rel=1e-6)


def test_losses_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (3, 5), generator=generator)
    expected = []
    for i in range(3):
        total = 0.0
        for t in range(5):
            exponents = [math.exp(float(v)) for v in outputs[i, t]]
            total -= math.log(exponents[int(targets[i, t])] / sum(exponents))
        expected.append(total / 5)
    assert sequence_losses(outputs, targets).tolist() == pytest.approx(expected, rel=1e-6)
    assert token_loss(outputs, targets.numpy()) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_certainty_is_one_and_certain_error_is_large_but_a_number() -> None:
    outputs = torch.zeros(1, 2, 3)
    outputs[..., 1] = 1e4
    assert perplexity(token_loss(outputs, torch.ones(1, 2, dtype=torch.int64))) == 1.0
    loss = token_loss(outputs, torch.zeros(1, 2, dtype=torch.int64))
    assert loss == 1e4 and perplexity(loss) == math.inf


@pytest.mark.parametrize(("outputs", "targets"), [((2, 3), (2,)), ((2, 3, 4), (2, 2)), ((2, 3, 4), (2, 3, 4))])
def test_shapes_that_do_not_match_are_refused(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="logits"):
        token_loss(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))
