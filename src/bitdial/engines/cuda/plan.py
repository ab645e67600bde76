"""What one batch size needs on a device: an arena that values share over time, and the recorded launches of each ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitdial.engines.cuda.arguments import Launch, Span
from bitdial.engines.cuda.compiler import Compiler
from bitdial.engines.cuda.device import ALIGNMENT, Device, DeviceMemoryError, Recorded
from bitdial.errors import EngineError
from bitdial.quantization.instructions import Instruction


def place(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """(offset of each buffer, size of the arena): no two that live at the same time share a byte.

    lives: first and last step, both included. The largest are placed first, each as low as it fits.
    """
    offsets = [0] * len(sizes)
    placed: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], lives[i])):
        size = -(-max(sizes[i], 1) // ALIGNMENT) * ALIGNMENT
        taken = sorted(
            (offsets[j], offsets[j] + -(-max(sizes[j], 1) // ALIGNMENT) * ALIGNMENT)
            for j in placed if lives[j][0] <= lives[i][1] and lives[i][0] <= lives[j][1]
        )  # fmt: skip
        at = 0
        for begin, end in taken:
            if at + size <= begin:
                break
            at = max(at, end)
        offsets[i] = at
        placed.append(i)
        total = max(total, at + size)
    return offsets, total


class Plan:
    """Of one batch size. Raises DeviceMemoryError where the device has no room for it."""

    def __init__(self, compiled: Compiler, device: Device, batch: int) -> None:
        self.compiled, self.device, self.batch = compiled, device, batch
        self.pool, self.ratio, self.multiprocessors = compiled.pool, 0, device.multiprocessors
        self.recorded: dict[int, list[Recorded | Instruction]] = {}
        program, root = compiled.program, compiled.root
        lives: dict[str, tuple[int, int]] = {root(v): (0, 0) for v in program.inputs}
        for index, step in enumerate(compiled.steps, start=1):
            for value in (step.value, *step.reads):
                first, _ = lives.get(root(value), (index, index))
                lives[root(value)] = first, index
        for value in (*program.outputs, *(v.value for v in compiled.look_ups)):  # the engine looks at both behind the run
            first, _ = lives[root(value)]
            lives[root(value)] = first, len(compiled.steps) + 1
        names = list(lives)
        sizes = [self._bytes(name) for name in names]
        offsets, self.size = place(sizes, [lives[name] for name in names])
        self.places = {name: (at, size) for name, at, size in zip(names, offsets, sizes, strict=True)}
        try:
            self.arena = device.allocate(self.size)
        except DeviceMemoryError as problem:
            raise DeviceMemoryError(
                f"a batch of {batch} needs {self.size / 2**20:.1f} MiB on the device, which has no room for it: "
                f"use a smaller batch ({problem})"
            ) from None

    def _bytes(self, name: str) -> int:
        buffer = self.compiled.buffers[name]
        size = buffer.item * self.batch
        if size >= 2**40 or buffer.factor * self.batch * buffer.places >= 2**31:
            raise EngineError(f"a batch of {self.batch} is too large for the cuda engine: use a smaller one")
        return size * buffer.bytes

    def span(self, value: str) -> Span:
        at, size = self.places[self.compiled.root(value)]
        return Span(self.arena.address + at, size)

    def run(self, ratio: int, elsewhere: Callable[[Instruction, Plan], None] | None = None) -> None:
        """Run the launches of a ratio, recorded at first use. elsewhere: computes what is no launch."""
        if ratio not in self.recorded:
            self.recorded[ratio] = self._record(ratio)
        self.ratio = ratio
        for part in self.recorded[ratio]:
            if not isinstance(part, Instruction):
                part.run()
            elif elsewhere is not None:
                elsewhere(part, self)

    def _record(self, ratio: int) -> list[Recorded | Instruction]:
        """The launches of a ratio: one graph, or several with instructions in between that are computed elsewhere."""
        self.ratio = ratio
        parts: list[Recorded | Instruction] = []
        launches: list[Launch] = []
        try:
            for step in (*self.compiled.steps, None):
                launch = None if step is None else step.launch(self)
                if launch is not None:
                    launches.append(launch)
                if (step is None or step.elsewhere is not None) and launches:
                    parts.append(self.device.record(launches))
                    launches = []
                if step is not None and step.elsewhere is not None:
                    parts.append(step.elsewhere)
        except EngineError:
            release(parts)
            raise
        return parts

    def launches(self, ratio: int) -> list[tuple[str, Launch]]:
        """(name of the step, its launch) of every step that runs at a ratio."""
        self.ratio = ratio
        found = ((step.name, step.launch(self)) for step in self.compiled.steps)
        return [(name, launch) for name, launch in found if launch is not None]

    def close(self) -> None:
        for parts in self.recorded.values():
            release(parts)
        self.recorded.clear()
        self.device.free(self.arena)


def release(parts: Sequence[Recorded | Instruction]) -> None:
    for part in parts:
        if not isinstance(part, Instruction):
            part.close()
