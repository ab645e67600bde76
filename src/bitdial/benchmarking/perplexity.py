"""Perplexity of language models: exp of the mean negative log-likelihood of the next token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitdial.errors import DataError


def sequence_losses(outputs: Tensor, targets: Any) -> Tensor:
    """float64 [N]: mean negative log-likelihood in nats per token of each sequence.

    outputs: logits [N, T, vocabulary]; targets: integers [N, T], the tokens that follow. Raises DataError for shapes that
    do not match.
    """
    wanted = torch.as_tensor(targets, device=outputs.device)
    if outputs.dim() != 3 or tuple(wanted.shape) != tuple(outputs.shape[:2]):
        raise DataError(
            f"outputs have shape {list(outputs.shape)}, targets {list(wanted.shape)}; perplexity needs logits "
            "[N, T, vocabulary] and targets [N, T]"
        )
    likelihood = torch.log_softmax(outputs.double(), dim=-1).gather(-1, wanted.long().unsqueeze(-1))
    return -likelihood.squeeze(-1).mean(dim=1)


def token_loss(outputs: Tensor, targets: Any) -> float:
    """Mean negative log-likelihood in nats per token: a `metric` for `QuantizedModel.evaluate`.

    Means over batches average to the mean over all tokens (sequences have one length), which those of perplexities would
    not: take `perplexity` of the result. Less is better here.
    """
    return float(sequence_losses(outputs, targets).mean())


def perplexity(loss: float) -> float:
    """exp(loss), for a mean loss in nats per token; infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
