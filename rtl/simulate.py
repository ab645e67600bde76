"""The unit in Amaranth's own simulator, driven as a host would drive it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from amaranth.sim import Simulator

from bitdial.engines.npu.words import Memory, Register, Words
from rtl.npu import Npu


@dataclass
class Run:
    """sums: int32 [entries, columns]. cycles, status: as the registers have them."""

    sums: npt.NDArray[np.int32]
    cycles: int
    status: int


class Simulated:
    """One unit, elaborated once; each `run` starts from a reset. Banks are filled directly, without the bus."""

    def __init__(self, npu: Npu) -> None:
        self.npu = npu
        self.simulator = Simulator(npu)
        self.simulator.add_clock(1e-6)
        self._script: Callable[[Any], Any] | None = None
        self._fresh = True
        self.simulator.add_testbench(self._call)

    async def _call(self, context: Any) -> None:
        assert self._script is not None
        await self._script(context)

    def drive(self, script: Callable[[Any], Any]) -> None:
        """Run a testbench from reset."""
        self._script = script
        if not self._fresh:
            self.simulator.reset()
        self._fresh = False
        self.simulator.run()

    def run(
        self,
        words: Words,
        activations: npt.NDArray[np.uint16],
        weights: npt.NDArray[np.uint8],
        shifts: npt.NDArray[np.uint8],
        entries: int,
        limit: int = 1_000_000,
    ) -> Run:
        """Fill the banks, start, wait, and read `entries` sums of every column."""
        array = self.npu.array
        result: list[Run] = []

        async def script(context: Any) -> None:
            for banks, image in (
                (array.activation_banks, activations), (array.weight_banks, weights), (array.shift_banks, shifts),
            ):  # fmt: skip
                for number, bank in enumerate(banks):
                    for at, value in enumerate(image[:, number].tolist()):
                        context.set(bank.memory.data[at], value)
            for at, word in enumerate(words.tolist()):
                context.set(self.npu.program.data[at], word)
            await write(context, self.npu, Register.LENGTH, len(words))
            await write(context, self.npu, Register.CONTROL, 1)
            for _ in range(limit):
                if not context.get(self.npu.sequencer.busy):
                    break
                await context.tick()
            await context.tick()
            sums = [[context.get(bank.memory.data[at]) for bank in array.sum_banks] for at in range(entries)]
            cycles = await read(context, self.npu, Register.CYCLES)
            status = await read(context, self.npu, Register.STATUS)
            result.append(Run(np.array(sums, np.int32).reshape(entries, len(array.sum_banks)), cycles, status))

        self.drive(script)
        return result[0]


async def write(context: Any, npu: Npu, register: Register, value: int) -> None:
    """One write of the bus."""
    context.set(npu.address, register)
    context.set(npu.write_data, value)
    context.set(npu.write, 1)
    await context.tick()
    context.set(npu.write, 0)


async def read(context: Any, npu: Npu, register: Register) -> int:
    """One read of the bus; waits a cycle more for the banks."""
    await context.tick()
    context.set(npu.address, register)
    context.set(npu.read, 1)
    await context.tick()
    context.set(npu.read, 0)
    return int(context.get(npu.read_data))


async def fill(context: Any, npu: Npu, memory: Memory, bank: int, values: list[int]) -> None:
    """Write a bank from its first entry through the bus."""
    await write(context, npu, Register.SELECT, memory << 12 | bank)
    await write(context, npu, Register.ADDRESS, 0)
    for value in values:
        await write(context, npu, Register.DATA, value)
