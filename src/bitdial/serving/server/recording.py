"""Writing down what a model's scheduler decides, while it serves."""

from __future__ import annotations

import logging
from pathlib import Path

from bitdial.errors import OutputError
from bitdial.files import remedy
from bitdial.serving.control import Recorder, Scheduler

logger = logging.getLogger("bitdial.serving")


class Recording:
    """Of one scheduler, to a file that it begins anew. Raises OutputError if that cannot be opened."""

    def __init__(self, path: Path, scheduler: Scheduler, policy: str, workers: int) -> None:
        try:
            self._stream = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise OutputError(f"decisions cannot be recorded to {path}: {error.strerror}; {remedy(error)}") from error
        self.path, self._scheduler = path, scheduler
        self._recorder = Recorder(self._stream, scheduler.table.table, scheduler.settings, policy, workers)
        scheduler.observer = self._recorder

    def close(self, why: str = "") -> None:
        """End it; `why` is logged where it is not the end of serving."""
        self._scheduler.observer = None
        problem = self._recorder.error
        try:
            self._stream.close()
        except OSError as error:
            problem = problem or str(error)
        if problem:
            logger.warning("the recording %s is not complete: %s", self.path, problem)
        elif why:
            logger.warning("the recording %s ends, because %s", self.path, why)
