"""The executor of the preparation: in bytes, in pieces, with torch's 8-bit products; equal to the exact one to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdial import QuantizeConfig
from bitdial.engines.reference import arithmetic, fast_conv
from bitdial.engines.reference.executor import Executor
from bitdial.engines.reference.fast_conv import FastExecutor, int8_convolutions
from bitdial.pipeline import answers, prepare, quantize_prepared
from bitdial.quantization.byte_products import sample_sum
from bitdial.quantization.instructions import Window

CONFIG = QuantizeConfig(target="paper", group_size=8, calibration_images=12, batch_size=6, selector="greedy")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("groups", [1, 20])
def test_eight_bit_convolutions_are_used_only_where_they_are_exact(signed: bool, groups: int) -> None:
    assert int8_convolutions() in (True, False)
    if int8_convolutions():
        generator = torch.Generator().manual_seed(1)
        window = Window((3, 3), (2, 1), (0, 1), (1, 1))
        x = torch.randint(0, 256, (3, 20, 9, 7), generator=generator).float() - (128.0 if signed else 0.0)
        w = torch.randint(-127, 128, (40, 20 // groups, 3, 3), generator=generator).float()
        exact = torch.nn.functional.conv2d(x.double(), w.double(), None, [2, 1], [0, 1], groups=groups)
        packed = fast_conv._packed(x.shape, w, window, signed)
        for operand in (x, x.to(torch.int8 if signed else torch.uint8)):
            for n in (3, 1):
                assert torch.equal(fast_conv._int8_conv(operand[:n], packed, 40, groups, window, signed).double(), exact[:n])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 5, 7])
def test_every_byte_is_extracted_as_its_float(signed: bool, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    values = torch.arange(-127.0, 128.0) if signed else torch.arange(256.0)
    x = values[:, None].expand(-1, 9 - bits + 1).contiguous()
    shifts = torch.tensor([0.0, *range(9 - bits)])[: x.shape[1]]  # the first channel stays at 8 bits
    shifts = shifts.clamp(max=(7 if signed else 8) - limit.bit_length())
    power = torch.exp2(shifts)
    high = torch.full_like(power, float(limit))
    high[0] = 127.0 if signed else 255.0
    low = -high if signed else torch.zeros_like(high)
    exact = arithmetic.extract(x, 1.0 / power, low, high, power)
    kind = torch.int8 if signed else torch.uint8
    before = x.to(kind)
    found = arithmetic.extract_bytes(before, power, low, high)
    assert found.dtype == kind and torch.equal(found.float(), exact)
    assert torch.equal(before.float(), x)  # in place only in what is its own


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
def test_sums_of_bytes_are_exact(kind: torch.dtype) -> None:
    extreme = 255 if kind == torch.uint8 else -127
    for shape in ((1000, 5), (700, 3, 4, 2), (3, 2)):
        x = torch.full(shape, extreme, dtype=kind)
        assert torch.equal(sample_sum(x), x.double().sum(dim=0))
    x = torch.full((300, 3, 4, 2), extreme, dtype=kind).contiguous(memory_format=torch.channels_last)
    assert torch.equal(sample_sum(x), x.double().sum(dim=0))


class Branches(nn.Module):
    """A depthwise layer with an uneven pad before it, a residual, a signed input, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.point, self.second = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1)
        self.third, self.last = nn.Conv2d(24, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(nn.functional.pad(torch.relu(self.first(x)), (0, 1, 0, 1))))
        x = self.point(x)
        x = torch.relu(self.third(x + self.second(x)))
        out: Tensor = self.last(x.mean(dim=(2, 3)))
        return out


def test_bytes_in_pieces_give_the_exact_values(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = helpers.images(12)
    program = quantize_prepared(prepare(Branches().eval(), [images], CONFIG), CONFIG)
    monkeypatch.setattr(fast_conv, "PIECE", 700)  # from a sample at a time to a few
    for index in range(len(program.ratios)):
        exact, fast = Executor(program), FastExecutor(program)
        wanted: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            outputs = exact.run([images], exact.settings(index), observe=wanted.__setitem__)
            own = fast.run([images], fast.settings(index), observe=found.__setitem__)
        assert all(torch.equal(a, b) for a, b in zip(outputs, own, strict=True))
        assert list(wanted) == list(found)
        for name, value in found.items():
            assert torch.equal(value.float(), wanted[name]), name
            assert (value.element_size() == 1) == (name in program.qparams)


def test_answers_take_the_outputs_that_there_are(conv_net: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias table's walks end with every ratio's outputs, the 8-bit model's too: none is computed a second time."""
    prepared = prepare(conv_net, [helpers.images(12)], CONFIG)
    wanted = quantize_prepared(prepared, CONFIG)
    ran: list[int] = []
    run = answers.AnswerComparison._run
    kept = answers.AnswerComparison(wanted, prepared.batches(CONFIG.batch_size)).provenance(CONFIG.keep_answers)
    monkeypatch.setattr(answers.AnswerComparison, "_run", lambda self, index: ran.append(index) or run(self, index))
    assert quantize_prepared(prepared, CONFIG).provenance["answers"] == wanted.provenance["answers"] == kept["answers"]
    assert not ran
