"""The register bus, and what the sequencer does with words that are wrong or cut short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from npu_cases import SMALL, random_case

from bitdial.engines.npu.images import activation_image, shift_image, weight_image
from bitdial.engines.npu.plan import Geometry
from bitdial.engines.npu.program import job_instructions
from bitdial.engines.npu.words import Fault, Instruction, Memory, Operation, Register, Setting, decode, encode
from bitdial.errors import EngineError

NOTHING = np.zeros((0, 4), np.uint8)
RUN, END = Instruction(Operation.RUN), Instruction(Operation.END)


def status_of(simulated: Any, words: np.ndarray) -> tuple[int, int]:
    done = simulated.run(words, NOTHING.astype(np.uint16), NOTHING, NOTHING, 0, limit=500)
    return done.status, done.cycles


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (encode([Instruction(Operation.SET, Setting.LOW, 3)]), Fault.TRUNCATED),
        (encode([RUN]), Fault.EMPTY),
        (np.array([0x70000000], np.uint32), Fault.ILLEGAL),
        (np.array([0x1FF00000], np.uint32), Fault.ILLEGAL),
        (np.zeros(0, np.uint32), Fault.TRUNCATED),
        (encode([Instruction(Operation.SET, Setting.COUNT, 256), Instruction(Operation.CHUNK), END]), Fault.ILLEGAL),
    ],
    ids=["cut short", "empty job", "operation", "setting", "no words", "full table"],
)
def test_the_sequencer_stops_with_an_error_bit(small: Any, words: np.ndarray, fault: Fault) -> None:
    status, _ = status_of(small, words)
    assert status == 2 | 1 << fault  # done, not busy


def test_a_job_through_the_bus(small: Any) -> None:
    """Everything as a host does it; a write while busy is dropped and told, and does not disturb the job."""
    from rtl.simulate import fill, read, write

    case = random_case(np.random.default_rng(2), Geometry.linear(11, 4, 3), True, 8)
    plan = case.plan(SMALL)
    (job,) = plan.jobs
    words = encode(job_instructions(plan, job, True, plan.low[1]))
    images = (
        (Memory.ACTIVATIONS, activation_image(plan, job, case.x, SMALL)),
        (Memory.WEIGHTS, weight_image(plan, job, case.weight, case.low_weight, SMALL)),
        (Memory.SHIFTS, shift_image(job, case.weight_shift, SMALL)),
    )
    found: list[list[int]] = []
    registers: dict[str, int] = {}

    async def host(context: Any) -> None:
        npu = small.npu
        await fill(context, npu, Memory.INSTRUCTIONS, 0, words.tolist())
        for memory, image in images:
            for bank in range(image.shape[1]):
                await fill(context, npu, memory, bank, image[:, bank].tolist())
        await write(context, npu, Register.LENGTH, len(words))
        await write(context, npu, Register.CONTROL, 1)
        await write(context, npu, Register.LENGTH, 0)
        registers["running"] = await read(context, npu, Register.STATUS)
        while (await read(context, npu, Register.STATUS)) & 1:
            pass
        registers["ended"] = await read(context, npu, Register.STATUS)
        await write(context, npu, Register.STATUS, 0)
        registers["cleared"] = await read(context, npu, Register.STATUS)
        registers["shape"] = await read(context, npu, Register.SHAPE)
        registers["length"] = await read(context, npu, Register.LENGTH)
        for bank in range(4):
            await write(context, npu, Register.SELECT, Memory.SUMS << 12 | bank)
            await write(context, npu, Register.ADDRESS, 0)
            found.append([])
            for _ in range(3):
                await context.tick()
                value = await read(context, npu, Register.DATA)
                found[-1].append(value - (1 << 32) if value >> 31 else value)

    small.drive(host)
    assert registers == {
        "running": 1 | 1 << Fault.BUSY_WRITE, "ended": 2 | 1 << Fault.BUSY_WRITE, "cleared": 0, "shape": 4 << 16 | 4,
        "length": len(words),
    }  # fmt: skip
    np.testing.assert_array_equal(found, case.expected(1)[:, :, 0])


def test_words_survive_encoding() -> None:
    case = random_case(np.random.default_rng(2), Geometry.linear(11, 4, 3), True, 8)
    plan = case.plan(SMALL)
    listed = job_instructions(plan, plan.jobs[0], True, 2)
    assert decode(encode(listed)) == listed


def test_a_stream_cut_short_or_broken_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="2 instruction words end without END: the stream was cut short"):
        decode(encode([Instruction(Operation.SET, Setting.LOW, 1), RUN]))
    with pytest.raises(EngineError, match="word 1 is 0x70000000, no instruction"):
        decode(np.array([encode([RUN])[0], 0x70000000], np.uint32))
    with pytest.raises(EngineError, match="TILES 70000 does not fit"):
        encode([Instruction(Operation.SET, Setting.TILES, 70000)])
