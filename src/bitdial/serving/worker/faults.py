"""Faults that tests ask a worker's process for, through BITDIAL_TEST_FAULT; nothing happens unless it is set.

crash-after:N   the process kills itself with SIGSEGV in the middle of batch N + 1
hang-after:N    batch N + 1 never ends
slow:SECONDS    every batch takes so much longer
crash-at-load   SIGSEGV before the model is loaded
stuck-at-end    the process does not end when it is told to
"""

from __future__ import annotations

import os
import resource
import signal
import time

VARIABLE = "BITDIAL_TEST_FAULT"


class Fault:
    """What the variable asks for."""

    def __init__(self, text: str | None = None) -> None:
        text = os.environ.get(VARIABLE, "") if text is None else text
        self._kind, _, number = text.partition(":")
        self._number = float(number or 0)
        self._batches = 0

    def at_load(self) -> None:
        if self._kind == "crash-at-load":
            _crash()

    def at_batch(self) -> None:
        if not self._kind:
            return
        self._batches += 1
        if self._kind == "slow":
            time.sleep(self._number)
        elif self._kind == "crash-after" and self._batches > self._number:
            _crash()
        elif self._kind == "hang-after" and self._batches > self._number:
            _sleep_forever()

    def at_end(self) -> None:
        if self._kind == "stuck-at-end":
            _sleep_forever()


def _crash() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file for a test
    os.kill(os.getpid(), signal.SIGSEGV)


def _sleep_forever() -> None:
    while True:
        time.sleep(3600)
