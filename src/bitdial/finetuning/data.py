"""Training batches in an order that depends on the seed and the epoch alone, so that an interrupted run can go on exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.errors import ConfigError, DataError

Batch = tuple[list[Tensor], Tensor]  # one tensor per model input, targets
Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches(Protocol):
    """Training data: the same batches for the same epoch, every time it is asked."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), beginning with batch `start`."""
        ...


@dataclass(frozen=True)
class SampledBatches:
    """Samples shuffled per epoch; a short last batch is left out, since it would weigh its samples more.

    n         number of samples
    read      (positions int64 [k]) -> (inputs [k, ..], targets [k])
    size      samples per batch
    seed      of order and augmentation
    augment   changes a batch of inputs, drawing from the generator given; None: nothing
    """

    n: int
    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    size: int
    seed: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"batch size {self.size} must be at least 1")
        if self.n < 1:
            raise DataError("there are no training samples: give at least one")

    @property
    def steps(self) -> int:
        return max(1, self.n // self.size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(self.n, generator=generator(self.seed, number))
        for step in range(start, self.steps):
            inputs, targets = self.read(order[step * self.size : (step + 1) * self.size])
            if self.augment is not None:
                inputs = self.augment(inputs, generator(self.seed, number, step))
            yield [inputs], targets


@dataclass(frozen=True)
class LoaderBatches:
    """Any iterable that can be iterated once per epoch, such as a DataLoader.

    torch's global generator is set per epoch while the loader works, so a DataLoader with shuffle=True repeats its order. A
    resumed run skips the batches it has seen; they are read all the same.
    """

    loader: Iterable[Any]
    seed: int = 0

    @property
    def steps(self) -> int:
        if not isinstance(self.loader, Sized):
            raise DataError(
                "the training data have no length: pass a DataLoader, a list of batches or a pair of tensors "
                "(a generator can be read only once)"
            )
        if len(self.loader) == 0:
            raise DataError("the training data are empty: give at least one batch")
        return len(self.loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        state = torch.Generator().manual_seed(_mix(self.seed, number)).get_state()
        batches: Iterator[Any] | None = None
        for step in itertools.count():
            with torch.random.fork_rng(devices=[]):  # order and augmentation may draw at any batch
                torch.set_rng_state(state)
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            if step >= start:
                yield split_batch(batch, step)


def split_batch(batch: Any, number: int) -> Batch:
    """(inputs.., targets) of a loader's batch. Raises DataError naming the batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch):
        raise DataError(
            f"training batch {number} is a {type(batch).__name__}: pass tuples of tensors, the model's inputs first, "
            "the targets last"
        )
    return list(batch[:-1]), batch[-1]


def training_batches(data: Any, size: int, seed: int, augment: Augment | None = None) -> Batches:
    """Batches of what a user gives: a pair (inputs [N, ..], targets [N]), or an iterable of batches (inputs.., targets).

    augment is for the pair only (a loader augments by itself). Raises DataError.
    """
    if isinstance(data, (SampledBatches, LoaderBatches)):
        return data
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    if pair and data[1].dim() <= 1:
        inputs, targets = data
        if len(inputs) != len(targets):
            raise DataError(f"{len(inputs)} training inputs and {len(targets)} targets: give one target per input")
        return SampledBatches(len(inputs), lambda at: (inputs[at], targets[at]), size, seed, augment)
    if not isinstance(data, Iterable):
        raise DataError(f"training data are a {type(data).__name__}: pass a pair of tensors or a DataLoader")
    if augment is not None:
        raise ConfigError("augment works on a pair of tensors; let the data set of a DataLoader augment by itself")
    return LoaderBatches(data, seed)


def flip_and_crop(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random horizontal flips and shifts by up to `padding` pixels (zeros move in), the usual augmentation of CIFAR.

    images: [N, C, H, W]. Source: He et al. 2016, section 4.2.
    """
    n, _, height, width = images.shape
    images = torch.where((torch.rand(n, generator=generator) < 0.5)[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by these numbers."""
    return torch.Generator().manual_seed(_mix(*numbers))


def _mix(*numbers: int) -> int:
    result = 0x9E3779B9
    for number in numbers:
        result = (result * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return result
