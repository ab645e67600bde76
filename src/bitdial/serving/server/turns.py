"""Long work on the event loop, one step of it per turn, so that all else goes on in between."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from bitdial.serving.protocol.slices import Steps

T = TypeVar("T")


class Turns:
    """Shares the loop's turns out. However many works there are, a turn holds one step of one of them, each in its turn."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # held over the end of a turn; serves in the order of asking

    async def run(self, steps: Steps[T]) -> T:
        """The result of work in steps. Its first step is done at once: most work has no other."""
        try:
            next(steps)
            while True:
                async with self._turn:
                    await asyncio.sleep(0)
                    next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
