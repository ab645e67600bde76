"""Training the zoo's digits networks on handwritten digits, with a checked cache of the trained weights."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bitdial.errors import ConfigError, DataError, OutputError
from bitdial.files import write_atomically
from bitdial.zoo.digits_data import load_digits_split
from bitdial.zoo.digits_net import digits, digits_wide
from bitdial.zoo.weights import StateDict, assign_weights

__all__ = ["DEFAULT_EPOCHS", "Network", "load_digits_split", "test_accuracy", "train_digits"]

Network = Literal["digits", "digits_wide"]
NETWORKS: dict[Network, Callable[[], nn.Module]] = {"digits": digits, "digits_wide": digits_wide}
# About 25 seconds of one AMD Zen 4 core each; the wide network needs fewer epochs.
DEFAULT_EPOCHS: dict[Network, int] = {"digits": 14, "digits_wide": 6}
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
SHIFT = 2  # pixels of 16; random translation of the training images
# Goes up with every change of the recipe, the data or the network, so that an old cache is not taken for a new one.
_RECIPE = "bitdial-digits-2"

Progress = Callable[[int, int, float], None]


def train_digits(
    seed: int = 0,
    epochs: int | None = None,
    progress: Progress | None = None,
    cache_path: Path | None = None,
    network: Network = "digits",
) -> nn.Module:
    """The trained network in evaluation mode, from the cache if that holds the same network, seed and number of epochs.

    AdamW, one cycle of the learning rate, label smoothing, random translation by up to two pixels. The result depends
    on the seed (and on the machine's floating point); the global random state is left alone.

    epochs      None: as DEFAULT_EPOCHS says
    progress    called after each epoch with (epoch from 1, epochs, mean training loss); not called on a cache hit
    cache_path  safetensors file. A file that is damaged, altered or of other settings is replaced; one that cannot be
                written costs a warning
    network     "digits" or "digits_wide" of `bitdial.zoo.architectures`

    Raises ConfigError for epochs < 1, a negative seed or another network, DataError if scikit-learn is not installed.
    """
    if network not in NETWORKS:
        raise ConfigError(f"network '{network}' is no digits network: choose one of {sorted(NETWORKS)}")
    if epochs is None:
        epochs = DEFAULT_EPOCHS[network]
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; it must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must not be negative")
    if cache_path is not None:
        cached = _read_cache(cache_path, network, seed, epochs)
        if cached is not None:
            return cached
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _train(NETWORKS[network], seed, epochs, progress)
    if cache_path is not None:
        _write_cache(model, cache_path, network, seed, epochs)
    return model


def test_accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor, batch_size: int = 180) -> float:
    """Share of images [N, 1, 16, 16] whose largest logit is at the label [N], 0..1."""
    with torch.inference_mode():
        hits = sum(
            int((model(images[i : i + batch_size]).argmax(1) == labels[i : i + batch_size]).sum())
            for i in range(0, len(images), batch_size)
        )
    return hits / len(images)


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # the name makes pytest take it for a test otherwise


def _train(make: Callable[[], nn.Module], seed: int, epochs: int, progress: Progress | None) -> nn.Module:
    train_images, train_labels, _, _ = load_digits_split(seed)
    images, labels = torch.from_numpy(train_images), torch.from_numpy(train_labels)
    model = make()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images))
        for start in range(0, len(images), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            loss = F.cross_entropy(model(_translate(images[chosen])), labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if progress is not None:
            progress(epoch + 1, epochs, total / len(images))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model.eval()


def _translate(images: Tensor) -> Tensor:
    """Each image shifted by its own whole number of pixels in x and y; the border value fills in."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    top = torch.randint(0, 2 * SHIFT + 1, (n, 1))
    left = torch.randint(0, 2 * SHIFT + 1, (n, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def _read_cache(path: Path, network: Network, seed: int, epochs: int) -> nn.Module | None:
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if metadata != _metadata(state, network, seed, epochs):
            return None
        model = NETWORKS[network]()
        assign_weights(model, state, str(path))
    except (SafetensorError, OSError, ValueError, DataError):
        return None
    return model.eval()


def _write_cache(model: nn.Module, path: Path, network: Network, seed: int, epochs: int) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(state, metadata=_metadata(state, network, seed, epochs)))
    except (OSError, OutputError, SafetensorError) as error:
        warnings.warn(f"trained weights were not cached at {path} ({error}); the next run trains again", stacklevel=3)


def _metadata(state: StateDict, network: Network, seed: int, epochs: int) -> dict[str, str]:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {list(state[name].shape)}\n".encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    settings = {"recipe": _RECIPE, "network": network, "seed": str(seed), "epochs": str(epochs)}
    return {**settings, "sha256": digest.hexdigest()}
