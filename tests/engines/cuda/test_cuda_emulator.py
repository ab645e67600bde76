"""The emulator finds mistakes, and extraction while loading is that of bitdial.quantization.effective_bits for every byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_layers import placed

from bitdial.engines.cuda import arguments
from bitdial.engines.cuda.arguments import Global, Launch, Span
from bitdial.engines.cuda.emulated import EmulatedDevice, build, find_compiler
from bitdial.engines.cuda.packing import extraction_code, limit_codes
from bitdial.errors import EngineError
from bitdial.quantization.effective_bits import extract

PROBES = Path(__file__).parent / "probes.h"
MISTAKES = [
    "beyond a tensor", "beyond a tensor", "race in shared", "race in shared", "before it is written", "beyond shared",
    "misaligned access to a tensor", "threads wait for others", "before its copies", "race in a tensor",
    "lane of a warp|threads wait", "ldmatrix", "race in shared|before it is written",
]  # fmt: skip


class ProbeArgs(arguments._Args):
    _fields_ = [("x", Global), ("y", Global), *arguments._fields(arguments._I32, "code least most a_signed mistake reserved")]


class Probe(Launch):
    shared_bytes = 2048  # type: ignore[assignment]


@pytest.fixture(scope="module")
def probes() -> EmulatedDevice:
    if find_compiler() is None:
        pytest.skip("NO C++ COMPILER: the kernels of the CUDA engine are not emulated")
    return EmulatedDevice(build(Path(__file__).parents[3] / "build" / "emulation", True, PROBES), True)


@pytest.mark.parametrize("signed", [False, True])
def test_extraction_of_every_byte(probes: EmulatedDevice, signed: bool) -> None:
    """All values in all places of a word, beside neighbours of both ends, at all shifts and limits that layers may have."""
    least, greatest = (-127, 127) if signed else (0, 255)
    values = np.arange(least, greatest + 1)
    blocks = [np.stack([values, np.full_like(values, end)], axis=1).reshape(-1) for end in (least, greatest, 0)]
    words = np.concatenate([np.roll(block, place) for block in blocks for place in range(4)])
    x, y = placed(probes, words.astype(np.int16).astype(np.uint8)), probes.allocate(len(words))
    found = np.empty(len(words), np.int8 if signed else np.uint8)
    for shift in range(8):
        for amax in [1, 3, 7, 12, 15, 31, 63, 100, 127] + ([] if signed else [128, 200, 255]):
            least, most = limit_codes(amax, signed)
            args = ProbeArgs(x=x, y=y, code=extraction_code(shift, signed), least=least, most=most, a_signed=int(signed))
            probes.launch(Probe("probe_extract", (1, 1, 1), args))
            probes.download(y, found)
            # extract gives int8, which limits above 127 do not fit
            expected = extract(words, shift, amax, signed).view(np.int8 if signed else np.uint8)
            assert np.array_equal(found, expected), (shift, amax)


def test_launches_without_mistakes(probes: EmulatedDevice) -> None:
    probes.launch(Probe("probe_mistake", (2, 1, 1), ProbeArgs(x=probes.allocate(64), y=probes.allocate(64))))


@pytest.mark.parametrize("mistake", range(1, len(MISTAKES) + 1))
def test_mistakes_are_found(probes: EmulatedDevice, mistake: int) -> None:
    args = ProbeArgs(x=probes.allocate(64), y=probes.allocate(64), mistake=mistake)
    with pytest.raises(EngineError, match=MISTAKES[mistake - 1]):
        probes.launch(Probe("probe_mistake", (1, 1, 1), args))


def test_arguments_have_the_layout_of_the_kernels(probes: EmulatedDevice) -> None:
    """A structure of another size is refused, as is an unknown name; every kernel takes one of the structures here."""
    with pytest.raises(EngineError, match="another size"):
        probes.launch(Probe("probe_mistake", (1, 1, 1), arguments.ConvArgs()))
    with pytest.raises(EngineError, match="no kernel"):
        probes.launch(Launch("nothing", (1, 1, 1), ProbeArgs()))
    takes = {"conv": arguments.ConvArgs, "matmul": arguments.MatMulArgs, "pointwise": arguments.PointwiseArgs,
             "attention": arguments.AttentionArgs,
             "pool": arguments.WindowArgs, "depthwise": arguments.WindowArgs, "elements": arguments.ElementsArgs,
             "whole": arguments.WholeRowsArgs, "shift": arguments.LowerArgs, "lower": arguments.LowerArgs}  # fmt: skip
    assert Span(0, 8).at(3) == Span(3, 5)
    for name in probes.kernels:
        kind = name.split("_")[0]
        if kind != "probe":
            probes.launch(Launch(name, (0, 0, 0), takes.get(kind, arguments.RowsArgs)()))
