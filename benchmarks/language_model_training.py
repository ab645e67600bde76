"""Train the character model of the language-model benchmark, with a checked cache of its weights.

AdamW, a linear warm-up and a cosine to zero, gradients clipped: a usual recipe (betas .9 and .99, weight decay .1 on all
parameters), not tuned beyond the learning rate. The result depends on the seed and on the machine's floating point, so rows
name the weights they were measured with by a digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from bitdial.benchmarking.perplexity import sequence_losses
from bitdial.errors import ConfigError, DataError
from bitdial.files import write_atomically
from bitdial.zoo.weights import assign_weights
from language.char_transformer import char_transformer
from language.text import Pair, TextData

RECIPE = "char-transformer-1"  # goes up with every change of the recipe or the network
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
WARM_UP_SHARE = 0.05
LARGEST_GRADIENT = 1.0
LOSS_WINDOWS = 100  # training windows that the final training loss is measured on, at most

Progress = Callable[[str, float], None]


def train(data: TextData, steps: int, seed: int, progress: Progress) -> nn.Module:
    """The network after `steps` batches of BATCH_SIZE windows, in evaluation mode. Raises ConfigError for steps < 1."""
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = char_transformer(len(data.vocabulary))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1.0 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
        ],
        [warm_up],
    )
    model.train()
    for number, (inputs, targets) in enumerate(data.batches(model.context, BATCH_SIZE, steps, seed)):
        logits = model(torch.from_numpy(inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        progress(f"training, loss {loss.item():.2f}", (number + 1) / steps)
    return model.eval()


def mean_loss(model: nn.Module, windows: Pair, batch: int = 64) -> float:
    """Nats per token of the float network on windows."""
    inputs, targets = (torch.from_numpy(part) for part in windows)
    with torch.inference_mode():
        parts = [
            sequence_losses(model(inputs[i : i + batch]), targets[i : i + batch]) for i in range(0, len(inputs), batch)
        ]
    return float(torch.cat(parts).mean())


def trained_model(
    training: TextData, validation: TextData, steps: int, seed: int, cache: Path, progress: Progress
) -> tuple[nn.Module, str, dict[str, Any]]:
    """(model, digest of its weights, how it was trained): from the cache folder if it holds this very training.

    The third holds steps, seed, parameters, seconds, threads, training_loss and validation_loss (nats per token).
    """
    settings = {
        "recipe": RECIPE,
        "steps": steps,
        "seed": seed,
        "text": hashlib.sha256(training.tokens.tobytes()).hexdigest()[:16],
        "vocabulary": training.vocabulary.characters,
    }
    digits = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"char_transformer.{digits}.safetensors"
    known = _read(path, settings, len(training.vocabulary))
    if known is not None:
        return known
    started = time.perf_counter()
    model = train(training, steps, seed, progress)
    seconds = time.perf_counter() - started
    shown = min(LOSS_WINDOWS, (len(training) - 1) // model.context)
    report = {
        "steps": steps,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "training_loss": mean_loss(model, training.chunks(model.context, shown)),
        "validation_loss": mean_loss(model, validation.chunks(model.context)),
    }
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "settings": json.dumps(settings, sort_keys=True),
        "report": json.dumps(report),
        "digest": _digest(state),
    }
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(state, metadata=metadata))
    return model, metadata["digest"], report


def _read(path: Path, settings: dict[str, Any], vocabulary: int) -> tuple[nn.Module, str, dict[str, Any]] | None:
    """What the file holds; None where it is missing, damaged or of another training."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if metadata["settings"] != json.dumps(settings, sort_keys=True) or metadata["digest"] != _digest(state):
            return None
        model = char_transformer(vocabulary)
        assign_weights(model, state, str(path))
        return model.eval(), metadata["digest"], json.loads(metadata["report"])
    except (SafetensorError, OSError, ValueError, KeyError, DataError):
        return None


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {list(state[name].shape)}\n".encode() + state[name].numpy().tobytes())
    return digest.hexdigest()[:16]
