"""Worker processes in lock-step: the parent asks one at a time to run; the others sleep in a read from their pipe.

Each contestant has a process of its own: thread pools that spin, allocators and math libraries of different versions
cannot disturb each other, and peak memory belongs to one contestant. Messages are JSON, one a line. The worker's own
standard output goes to standard error, so that what libraries print does not mix with the messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdial.errors import BitdialError

WORKER = Path(__file__).resolve().parent / "worker.py"
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
# A pool that waits actively after its work would steal the core from the next contestant.
BESIDE_OTHERS = {"OMP_WAIT_POLICY": "PASSIVE"}


class PeerError(BitdialError):
    """A contestant cannot run here; the message is its own."""


class Worker:
    """One contestant's process. Raises PeerError for what goes wrong in it.

    python: the interpreter, for contestants that are installed in an environment of their own. alone: no other contestant's
    process lives meanwhile, so that its pools wait as they do by themselves.
    """

    def __init__(
        self,
        adapter: str,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        timeout: float = 900.0,
        python: str = sys.executable,
        alone: bool = False,
    ) -> None:
        self.adapter, self.timeout = adapter, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        ours, theirs = os.pipe()  # worker -> parent
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [python, str(WORKER), adapter, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=(theirs,),
                env={**os.environ, **ENVIRONMENT, **({} if alone else BESIDE_OTHERS), **(environment or {})},
            )
        os.close(theirs)
        self._answers = os.fdopen(ours, "rb", buffering=0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._pending = b""

    def ask(self, do: str, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises PeerError."""
        assert self.process.stdin is not None
        request = json.dumps({"do": do, **arguments}).encode() + b"\n"
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except (OSError, ValueError):  # ValueError: closed from our side
            raise PeerError(f"{self.adapter} ended: {self._last_words()}") from None
        line = self._line(self.timeout if timeout is None else timeout, do)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.adapter}: {answer['error']}")
        return answer

    def _line(self, timeout: float, do: str) -> bytes:
        while b"\n" not in self._pending:
            if not self._selector.select(timeout):
                self.process.kill()
                raise PeerError(f"{self.adapter} gave no answer to '{do}' within {timeout:.0f} s")
            chunk = self._answers.read(1 << 16)
            if not chunk:
                raise PeerError(f"{self.adapter} ended: {self._last_words()}")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self.process.wait(10)
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit status {self.process.returncode}; {lines[-1] if lines else 'it said nothing'}"

    def calls(self, n: int, **arguments: Any) -> list[float]:
        """Seconds of each of n runs."""
        seconds: list[float] = self.ask("run", calls=n, **arguments)["seconds"]
        return seconds

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._selector.close()
        self._answers.close()
