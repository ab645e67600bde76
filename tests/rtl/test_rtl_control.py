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


@pytest.mark.parametrize("kept", ["all but END", "half of the settings"])
def test_a_job_cut_short_stops_with_an_error_bit(small: Any, kept: str) -> None:
    """Without END the job before it is done all the same; without RUN nothing is written. The unit is idle afterwards."""
    case = random_case(np.random.default_rng(2), Geometry.linear(11, 4, 3), True, 8)
    plan = case.plan(SMALL)
    (job,) = plan.jobs
    words = encode(job_instructions(plan, job, True, plan.low[1]))
    whole = kept == "all but END"
    done = small.run(
        words[:-1] if whole else words[: len(words) // 2], activation_image(plan, job, case.x, SMALL),
        weight_image(plan, job, case.weight, case.low_weight, SMALL), shift_image(job, case.weight_shift, SMALL), 3, limit=2000,
    )  # fmt: skip
    assert done.status == 2 | 1 << Fault.TRUNCATED
    np.testing.assert_array_equal(done.sums.T, case.expected(1)[:, :, 0] if whole else np.zeros((4, 3)))


def test_a_job_through_the_bus(small: Any) -> None:
    """Everything as a host does it, after a start that failed. Writes while busy, whatever the register, are dropped and told,
    and disturb neither the job nor the memories: it runs a second time with the same sums and cycles."""
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
    found: list[list[list[int]]] = []
    registers: dict[str, Any] = {}

    async def host(context: Any) -> None:
        npu = small.npu
        await fill(context, npu, Memory.INSTRUCTIONS, 0, words.tolist())
        for memory, image in images:
            for bank in range(image.shape[1]):
                await fill(context, npu, memory, bank, image[:, bank].tolist())
        await write(context, npu, Register.CONTROL, 1)  # LENGTH is 0
        registers["failed"] = await idle(context, npu)
        await write(context, npu, Register.STATUS, 0)
        await write(context, npu, Register.LENGTH, len(words))
        registers["cycles"] = []
        for disturbed in (True, False):
            await write(context, npu, Register.SELECT, Memory.INSTRUCTIONS << 12)
            await write(context, npu, Register.ADDRESS, 1)
            await write(context, npu, Register.CONTROL, 1)
            if disturbed:
                for register in (Register.LENGTH, Register.DATA, Register.SELECT, Register.ADDRESS, Register.CONTROL):
                    await write(context, npu, register, 1)
                registers["running"] = await read(context, npu, Register.STATUS)
            registers["disturbed" if disturbed else "alone"] = await idle(context, npu)
            registers["cycles"].append(await read(context, npu, Register.CYCLES))
            registers["place"] = await read(context, npu, Register.SELECT), await read(context, npu, Register.ADDRESS)
            await write(context, npu, Register.STATUS, 0)
            found.append(await sums(context, npu))
        registers["cleared"] = await read(context, npu, Register.STATUS)
        registers["shape"] = await read(context, npu, Register.SHAPE)
        registers["length"] = await read(context, npu, Register.LENGTH)

    async def idle(context: Any, npu: Any) -> int:
        while (await read(context, npu, Register.STATUS)) & 1:
            pass
        return await read(context, npu, Register.STATUS)

    async def sums(context: Any, npu: Any) -> list[list[int]]:
        banks: list[list[int]] = []
        for bank in range(4):
            await write(context, npu, Register.SELECT, Memory.SUMS << 12 | bank)
            await write(context, npu, Register.ADDRESS, 0)
            banks.append([])
            for _ in range(3):
                await context.tick()
                value = await read(context, npu, Register.DATA)
                banks[-1].append(value - (1 << 32) if value >> 31 else value)
        return banks

    small.drive(host)
    disturbed, alone = registers.pop("cycles")
    assert disturbed == alone > 0
    assert registers == {
        "failed": 2 | 1 << Fault.TRUNCATED, "running": 1 | 1 << Fault.BUSY_WRITE, "disturbed": 2 | 1 << Fault.BUSY_WRITE,
        "alone": 2, "place": (Memory.INSTRUCTIONS << 12, 1), "cleared": 0, "shape": 4 << 16 | 4, "length": len(words),
    }  # fmt: skip
    np.testing.assert_array_equal(found, [case.expected(1)[:, :, 0]] * 2)


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
