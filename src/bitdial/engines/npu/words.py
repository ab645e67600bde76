"""Instruction words and registers of the NPU: the one place that hardware, compiler, model and documents read. NumPy only.

A word has 32 bits, its operation in bits 28..31. Settings stay until they are written again, so that a change of ratio is one
`SET LOW` per layer. Addresses wrap at 16 bits.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitdial.errors import EngineError

Words = npt.NDArray[np.uint32]
MAX_CHUNKS = 256  # entries of the chunk table


class Operation(enum.IntEnum):
    """SET: setting <- value. CHUNK: append an entry to the table. RUN: all passes of the job. END: drain the array and stop."""

    SET = 1
    CHUNK = 2
    RUN = 3
    END = 15


class Setting(enum.IntEnum):
    """What SET writes, 16 bits each. Rows and columns of the input and output are those of one sample's image; a linear layer
    is an image of one row with a column per token."""

    LOW = 0  # max_4bit_ch: how many entries of the chunk table, from its start, run low
    COUNT = 1  # entries in the chunk table; CHUNK appends at it
    SIGNED = 2  # 1: activations are signed
    ORIGIN = 3  # activation address of output pixel 0 at tap 0 (may lie before the buffer: wraps)
    X_STEP = 4  # address step between output columns
    Y_STEP = 5  # address step between output rows
    X_TAP = 6  # address step between taps of a row
    Y_TAP = 7  # address step between rows of taps
    X_FIRST = 8  # input column of output column 0 at tap 0, signed (minus the padding)
    Y_FIRST = 9  # input row of output row 0 at tap 0, signed
    WIDTH = 10  # input columns; what lies outside reads as 0
    HEIGHT = 11  # input rows
    OUT_WIDTH = 12
    OUT_HEIGHT = 13
    KERNEL_WIDTH = 14
    KERNEL_HEIGHT = 15
    X_STRIDE = 16
    Y_STRIDE = 17
    X_DILATION = 18
    Y_DILATION = 19
    TILES = 20  # column tiles
    PIXELS = 21  # OUT_WIDTH * OUT_HEIGHT
    WEIGHTS = 22  # weight address of the first tile
    SHIFTS = 23  # shift address of the first chunk
    SUMS = 24  # accumulator address of the first pixel


SIGNED_SETTINGS = frozenset({Setting.X_FIRST, Setting.Y_FIRST})
WRAPPING = frozenset({Setting.ORIGIN, Setting.X_STEP, Setting.Y_STEP, Setting.X_TAP, Setting.Y_TAP})


class Register(enum.IntEnum):
    """Of the host's bus, 32 bits each. While the unit is busy only STATUS may be written (to clear errors)."""

    CONTROL = 0  # write 1: start at word 0
    STATUS = 1  # bit 0 busy, bit 1 done, bits 4..7: see Fault; a write clears bits 1 and 4..7
    LENGTH = 2  # instruction words
    CYCLES = 3  # read only: cycles of the last run
    SELECT = 4  # bits 12..15 a Memory, bits 0..11 the bank
    ADDRESS = 5  # in that bank; each access of DATA adds 1
    DATA = 6  # one entry of that bank
    SHAPE = 7  # read only: bits 0..15 rows, bits 16..31 columns


class Memory(enum.IntEnum):
    """INSTRUCTIONS: 32 bits, one bank. ACTIVATIONS: a bank a row, channels r and r + rows of a chunk in the low and high byte.
    WEIGHTS: a bank a column, a byte a row. SHIFTS: a bank a column, 4 bits. SUMS: a bank a column, int32."""

    INSTRUCTIONS = 0
    ACTIVATIONS = 1
    WEIGHTS = 2
    SHIFTS = 3
    SUMS = 4


class Fault(enum.IntEnum):
    """Bit of STATUS. All but BUSY_WRITE stop the sequencer."""

    TRUNCATED = 4  # the words ended without END
    ILLEGAL = 5  # unknown operation or setting, or a full chunk table
    EMPTY = 6  # RUN with nothing to do: a size of 0
    BUSY_WRITE = 7  # a register was written while busy; the write was dropped


@dataclass(frozen=True)
class Instruction:
    """One word. setting, value: of SET. value, low, halves, second, shift: of CHUNK: activation word inside a pixel, whether
    there is a low tile, 8-bit tiles (1 or 2), whether the only one is of the second half, activation shift (0..7)."""

    operation: Operation
    setting: Setting | None = None
    value: int = 0
    low: bool = False
    halves: int = 1
    second: bool = False
    shift: int = 0


def encode(instructions: Sequence[Instruction]) -> Words:
    """uint32 [n]. Raises EngineError for a value that does not fit its field."""
    return np.array([_word(i) for i in instructions], np.uint32)


def _word(i: Instruction) -> int:
    word, value = int(i.operation) << 28, i.value
    if i.operation is Operation.SET:
        assert i.setting is not None
        if i.setting in WRAPPING:
            value &= 0xFFFF
        low, high = (-(1 << 15), (1 << 15) - 1) if i.setting in SIGNED_SETTINGS else (0, (1 << 16) - 1)
        if not low <= value <= high:
            raise EngineError(f"npu: {i.setting.name} {value} does not fit its 16 bits")
        return word | int(i.setting) << 20 | (value & 0xFFFF)
    if i.operation is Operation.CHUNK:
        if not (0 <= value < 1 << 16 and i.halves in (1, 2) and 0 <= i.shift <= 7):
            raise EngineError(f"npu: a chunk at {value} with {i.halves} halves and shift {i.shift} does not fit its word")
        return word | int(i.low) << 24 | (i.halves - 1) << 25 | int(i.second) << 26 | i.shift << 20 | value
    return word


def decode(words: Words) -> list[Instruction]:
    """Instructions up to END and with it. Raises EngineError for unknown words and where END is missing, as the unit does."""
    result: list[Instruction] = []
    for at, word in enumerate(int(w) for w in words):
        value = word & 0xFFFF
        try:
            operation = Operation(word >> 28)
            if operation is Operation.SET:
                setting = Setting(word >> 20 & 0xFF)
                signed = setting in SIGNED_SETTINGS and value >= 1 << 15
                result.append(Instruction(operation, setting, value - (1 << 16) if signed else value))
                continue
        except ValueError:
            raise EngineError(f"npu: word {at} is {word:#010x}, no instruction; compile the artifact again") from None
        if operation is Operation.CHUNK:
            result.append(
                Instruction(
                    operation, None, value, bool(word >> 24 & 1), (word >> 25 & 1) + 1, bool(word >> 26 & 1), word >> 20 & 7
                )
            )
            continue
        result.append(Instruction(operation))
        if operation is Operation.END:
            return result
    raise EngineError(f"npu: the {len(words)} instruction words end without END: the stream was cut short")
