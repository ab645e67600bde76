"""Training with the compiled steps is training without them: outputs, gradients, and what they must leave to torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdial.engines.cpu import native
from bitdial.finetuning import kernels
from bitdial.finetuning.network import TrainableNetwork
from bitdial.finetuning.rounding import extract, function_table, look_up, requantize
from bitdial.pipeline.finetuning import start_graph

needs_extension = pytest.mark.skipif(bool(native.missing()), reason=f"CPU ENGINE MISSING: {native.missing()}")
DTYPES = [torch.float32, torch.bfloat16]


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, scale: float = 100.0) -> Tensor:
    values = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if layout == "channels last" else values


def run(twin: TrainableNetwork, images: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    twin.zero_grad()
    out = twin([images], index)[0]
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["conv_subject", "transformer_subject", "concat_subject"])
def test_a_step_with_them_is_a_step_without_them(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    subject: Any = request.getfixturevalue(name)
    twin = TrainableNetwork(start_graph(subject.prepared.graph, subject.program), subject.program, dtype=dtype)
    for index in (0, len(subject.program.ratios) - 1):
        with kernels.without_kernels():
            expected, gradients = run(twin, subject.images, index)
        found, own = run(twin, subject.images, index)
        # A rounding tie may fall the other way, where torch's product and sum are rounded once.
        assert float((found - expected).abs().max()) <= 0.02 * float(expected.abs().max())
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            difference = float((own[key] - gradient).norm())
            assert difference <= (0.02 if dtype == torch.float32 else 0.05) * float(gradient.norm()) + 1e-7, key


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    acc = laid_out((40, 24, 16, 16), "channels last", torch.bfloat16).requires_grad_()
    bias = torch.zeros(1, 24, 1, 1, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            acc.grad = bias.grad = None
            out = requantize(acc, torch.full((1, 24, 1, 1), 0.1), bias, -128, 127, torch.bfloat16)
            out.float().square().sum().backward()
            assert acc.grad is not None and bias.grad is not None
            found.append((out.detach(), acc.grad.clone(), bias.grad.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels last", "plain"])
def test_every_layout_gives_torch_s_result(layout: str, dtype: torch.dtype) -> None:
    """Gradients come laid out otherwise than the outputs were, too."""
    for shape in ((3, 5, 4, 7), (2, 16, 1, 1), (6, 33, 2, 2)):
        acc = laid_out(shape, layout, dtype).requires_grad_()
        residual = laid_out(shape, "plain", dtype, 20).round().requires_grad_()
        multiplier = torch.rand(1, shape[1], 1, 1) + 0.1
        bias = torch.randn(1, shape[1], 1, 1, requires_grad=True)
        weights = laid_out(shape, "plain", torch.float32, 1.0)
        results = []
        for compiled in (False, True):
            acc.grad = residual.grad = bias.grad = None
            with nullcontext() if compiled else kernels.without_kernels():
                out = requantize(acc, multiplier, bias, -128, 127, dtype, residual, 0.5)
            (out.float() * weights).sum().backward()
            results.append([out.detach(), acc.grad, residual.grad, bias.grad])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_residual_keeps_its_precision_beside_bfloat16_integers(compiled: bool) -> None:
    """Its product with a scale has more bits than bfloat16, which once cost half a step of the output."""
    acc, residual = torch.zeros(1, 1, 16, 16), torch.arange(256.0).reshape(1, 1, 16, 16)
    one = torch.ones(1, 1, 1, 1)
    with nullcontext() if compiled else kernels.without_kernels():
        found = requantize(
            acc.bfloat16(), one, torch.zeros(1, 1, 1, 1), 0, 255, torch.bfloat16, residual.bfloat16(), 0.37
        )
    assert torch.equal(found.float(), (residual * 0.37).round())


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowering_is_torch_s(dtype: torch.dtype) -> None:
    for shape, vector in (((4, 12, 5, 3), (1, 12, 1, 1)), ((7, 9, 20), (20,)), ((5, 20), (20,))):
        x = laid_out(shape, "channels last" if len(shape) == 4 else "plain", torch.float32, 60).round()
        x = x.clamp(-127, 127).to(dtype).requires_grad_()
        shift = torch.arange(vector[1] if len(vector) > 1 else vector[0]).reshape(vector) % 5
        power = torch.exp2(shift.float()).to(dtype)
        limit = torch.where(shift == 0, 127.0, 7.0).to(dtype)
        results = []
        for compiled in (False, True):
            x.grad = None
            with nullcontext() if compiled else kernels.without_kernels():
                out = extract(x, 1 / power, power, -limit, limit)
            out.float().square().sum().backward()
            results.append((out.detach(), x.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert not torch.equal(results[0][0], x.detach())


@needs_extension
@pytest.mark.parametrize("signed", [True, False])
def test_a_table_has_the_values_and_slopes_of_its_function(signed: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return 40 * torch.tanh(x / 50)

    x = torch.arange(-127, 128) if signed else torch.arange(256)
    x = x.float().requires_grad_()
    found = look_up(x, function_table(function, signed))
    assert found is not None
    (slopes,) = torch.autograd.grad(found.sum(), x)
    expected = function(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sum(), x)[0])


def test_what_they_cannot_do_is_left_to_torch() -> None:
    square = torch.randn(4, 6, 5, 5)
    vector = torch.ones(1, 6, 1, 1)
    assert kernels.requantize(square.double(), vector, None, None, 1.0, -8, 7, torch.float32) is None
    assert kernels.requantize(square[:, :, ::2], vector, None, None, 1.0, -8, 7, torch.float32) is None
    assert kernels.requantize(square, torch.ones(4, 6, 1, 1), None, None, 1.0, -8, 7, torch.float32) is None
    assert kernels.requantize(square[:0], vector, None, None, 1.0, -8, 7, torch.float32) is None
    assert kernels.extract(square, *[torch.ones(4, 6, 1, 1)] * 4) is None  # a shift per sample
    learned = torch.ones(1, 6, 1, 1, requires_grad=True)
    requantize(square, learned, torch.zeros(1, 6, 1, 1), -8, 7).sum().backward()
    assert learned.grad is not None and float(learned.grad.abs().sum()) > 0
