"""The reference engine beside a compiled one, for instructions that the latter has no form of."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Collection, Sequence
from typing import Any

from bitdial.errors import EngineError
from bitdial.quantization.program import Program


class ReferenceSteps:
    """torch and an executor of the program. Imports torch when made: engines that need no fallback need none.

    engine: as messages call it. steps: names of the instructions that run here. named: the same as messages tell them. Raises
    EngineError without torch.
    """

    def __init__(self, program: Program, engine: str, steps: Collection[str], named: Sequence[str]) -> None:
        try:
            self.torch: Any = importlib.import_module("torch")
            executor = importlib.import_module("bitdial.engines.reference.executor")
        except ImportError as error:
            first = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
            raise EngineError(
                f"{engine} has no compiled form of {first}; it runs them in the reference engine, which needs torch "
                f"({error}): pip install bitdial[quantize]"
            ) from None
        self.executor: Any = executor.Executor(program)
        self._steps = steps
        self._settings: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def settings(self, index: int) -> dict[str, Any]:
        """Settings of the layers that run here, at a ratio of the program's table."""
        with self._lock:
            if index not in self._settings:
                self._settings[index] = self.executor.settings(index, self._steps)
            return self._settings[index]
