"""What all workers have in common: one model on one engine that computes one batch at a time."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy.typing as npt
from pydantic import Field

from bitdial.errors import ConfigError, EngineError
from bitdial.serving.worker.batching import count_samples
from bitdial.serving.worker.errors import WorkerCrash
from bitdial.serving.worker.file import ModelFile
from bitdial.serving.worker.info import ModelInfo
from bitdial.settings import BaseConfig

Array = npt.NDArray[Any]


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class WorkerOptions(BaseConfig):
    """How a model is loaded and watched."""

    engine: str | None = Field(
        default=None, description="Name; None: the compiled one where it runs the model, else the reference."
    )
    engine_options: Mapping[str, Any] = Field(
        default_factory=dict,
        description="As the engine takes them (isa, threads, memory, kernels, batch_hint; device).",
    )
    max_batch: int = Field(
        default=32, ge=1, le=65536, strict=True,
        description="Samples of the largest batch; shared memory is laid out for it (pages are taken when first used).",
    )  # fmt: skip
    name: str | None = Field(default=None, description="Of the model; None: from the file's name.")
    patience: Seconds = Field(default=30.0, description="A batch that takes longer counts as hung, and its worker is killed.")
    start_timeout: Seconds = Field(default=600.0, description="The same for loading the model.")
    grace: Seconds = Field(
        default=5.0, description="How long `stop` waits for a running batch and for the process to end, before it is killed."
    )

    def loading(self) -> dict[str, Any]:
        """What `model.LoadedModel` takes of it."""
        options = dict(self.engine_options)
        return {"engine": self.engine, "options": options, "max_batch": self.max_batch, "name": self.name}

    @property
    def threads(self) -> int:
        """Threads that the worker's engine is to use."""
        threads = self.engine_options.get("threads", 1)
        return threads if isinstance(threads, int) and threads > 0 else 1


@dataclass(frozen=True)
class Result:
    """Of one batch.

    outputs   [request][output], memory of their own; an empty list for a request whose input was bad
    index     ratio index that the batch ran at
    compute   seconds inside the engine; with a pace, modelled ones
    checked   per request "" or why its input was bad (NaN, infinity); the other requests were computed all the same
    overrun   with a pace: the arithmetic took longer than the modelled time allows, and `compute` is what it took
    """

    outputs: list[list[Array]]
    index: int
    compute: float
    checked: list[str]
    overrun: bool = False


class Worker(ABC):
    """One model on one engine, one batch at a time. Belongs to the event loop that it was started on.

    model      its file, by path, or open (then it remains the caller's to close)
    on_lost    called once if the worker dies or hangs, running a batch or not
    on_free    called when it has ended a batch whose call was cancelled
    busy       it has a batch, even if nobody waits for that any more
    """

    def __init__(self, model: str | os.PathLike[str] | ModelFile, options: WorkerOptions | None = None) -> None:
        self._file, self.options = model, options or WorkerOptions()
        self.on_lost: Callable[[WorkerCrash], None] | None = None
        self.on_free: Callable[[], None] | None = None
        self.busy = False
        self._info: ModelInfo | None = None
        self._crash: WorkerCrash | None = None
        self._begun = self._stopping = False

    @property
    def info(self) -> ModelInfo:
        """Known once started."""
        if self._info is None:
            raise EngineError("the worker has not been started")
        return self._info

    @property
    def alive(self) -> bool:
        """Started, and neither stopped nor lost."""
        return self._info is not None and self._crash is None and not self._stopping

    async def start(self) -> ModelInfo:
        """Load the model and run it once at every ratio. Raises BitdialError (ArtifactError, EngineError, UnservableError, ...,
        WorkerCrash if it dies at that); then nothing is left running."""
        if self._begun or self._stopping:
            raise EngineError("a worker can be started once: make a new one")
        self._begun = True
        with contextlib.ExitStack() as stack:
            file = self._file
            if not isinstance(file, ModelFile):
                file = stack.enter_context(contextlib.closing(ModelFile(file)))
            try:
                self._info = await self._load(file)
            except BaseException:
                self._stopping = True  # its end is no loss to tell anyone of
                await self._abandon()
                raise
            return self._info

    @abstractmethod
    async def run(self, requests: Sequence[Sequence[Array]], index: int, pace: float = 0.0) -> Result:
        """Compute requests, each one array per input, together at ratio index `index`.

        pace: where the engine's time is modelled, seconds of the wall clock that one of its seconds is to take; 0: as quick as it
        can be.

        Raises InputError for wrong numbers, dtypes or shapes or too many samples (nothing is computed then), EngineError if
        the engine failed on all requests or has another batch, WorkerCrash if the worker is lost. A call that is cancelled does
        not stop the batch: the worker stays busy until it is done.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Let a running batch finish, end the worker and free all it held; may be called more than once."""

    # ---- for those that make it ------------------------------------------------------------------------------------------

    @abstractmethod
    async def _load(self, file: ModelFile) -> ModelInfo: ...

    @abstractmethod
    async def _abandon(self) -> None:
        """End what a start that failed has left."""

    def _check(self, requests: Sequence[Sequence[Array]], index: int) -> list[int]:
        """Samples of each request of a batch that may begin now. Raises as `Worker.run`."""
        info = self.info
        if not 0 <= index < len(info.ratios):
            raise ConfigError(f"ratio index {index} is outside 0..{len(info.ratios) - 1}")
        samples = count_samples(info, requests, self.options.max_batch)
        if not self.alive:
            raise self._crash or WorkerCrash("the worker has been stopped")
        if self.busy:
            raise EngineError("the worker has a batch already: it computes one at a time")
        return samples

    def _hold(self, samples: Sequence[int], index: int, pace: float) -> float:
        """Seconds that a batch is to take at this pace; 0: as quick as it can be."""
        return pace * self.info.modelled[index] * sum(samples) if pace and self.info.modelled else 0.0

    @staticmethod
    def _result(
        outputs: list[list[Array]], index: int, seconds: float, checked: list[str], hold: float, pace: float
    ) -> Result:
        """seconds: inside the engine. hold: as `_hold` said."""
        if not hold:
            return Result(outputs, index, seconds, checked)
        return Result(outputs, index, max(seconds, hold) / pace, checked, seconds > hold)

    def _lose(self, crash: WorkerCrash) -> None:
        self._crash = crash
        if self._info is not None and not self._stopping and self.on_lost is not None:
            self.on_lost(crash)

    def _freed(self, abandoned: bool) -> None:
        """A batch is over; abandoned: and nobody waits for its results."""
        self.busy = False
        if abandoned and self.on_free is not None:
            self.on_free()
