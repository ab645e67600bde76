"""What is wrong with calibration data or with a network is named, with the remedy: before the export's own words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bitdial
from bitdial import QuantizeConfig
from bitdial.errors import CalibrationError, CaptureError
from bitdial.pipeline.causes import causes_named
from bitdial.pipeline.samples import gather, plain_module
from bitdial.report.collect import collect_report
from bitdial.report.page import render_html
from bitdial.selection.layerwise import LayerwiseConfig

GREEDY = QuantizeConfig(target="paper", selector="greedy", calibration_images=16, search_images=4, group_size=8, ratios=(1.0,))


class Net(nn.Module):
    """Images [N, 3, 8, 8] -> [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
        return out


class Two(nn.Module):
    """Vectors [N, 6] and [N, 4] -> [N, 3]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c, self.dropout = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3), dropout

    def both(self, x: Tensor, y: Tensor | None) -> Tensor:
        h = self.a(x) if y is None else self.a(x) + self.b(y)
        out: Tensor = self.c(F.dropout(torch.relu(h), self.dropout))
        return out

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.both(x, target)


class Optional(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return self.both(x, mask) * scale


class OptionalTarget(Two):
    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.both(x, target)


class WithLoss(Two):
    """As language models do: with labels, a loss comes first."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        out = self.both(x, None)
        return out if labels is None else (F.cross_entropy(out, labels), out)


class Several(Two):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.both(*inputs)


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(self.table(x)))) * scale[:, None, None]
        return out


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IMAGES, LEFT, RIGHT = random(16, 3, 8, 8), random(16, 6), random(16, 4)
CLASSES = torch.arange(16) % 3

# name -> (network, calibration data, error, what it says)
CAUSES: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "float64": (Net, IMAGES.double(), CalibrationError, r"are float64, .* in float32: pass x.float\(\)"),
    "float16 in one of two": (
        Two, [(LEFT, RIGHT.half())], CalibrationError, r"input '1' is float16, .* pass x.float\(\)"
    ),
    "float64 in both of two": (
        Two, [{"x": LEFT.double(), "target": RIGHT.double()}], CalibrationError, r"data are float64"
    ),
    "bytes": (Net, (IMAGES * 9).to(torch.uint8), CalibrationError, r"are uint8, .* scaled and normalized as in training"),
    "floats as indices": (
        Ids, [{"x": torch.arange(30.0).reshape(6, 5) % 10, "scale": torch.ones(6) * 2.0}], CalibrationError,
        r"input 'x' is float32, the network looks up indices: pass x.long\(\)",
    ),
    "unbatched": (Net, list(IMAGES), CalibrationError, r"no batch dimension: .*torch.stack\(samples\)"),
    "unbatched vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), list(LEFT), CalibrationError, "no batch"),
    "unbatched float64": (Net, list(IMAGES.double()), CalibrationError, r"no batch dimension.*float64.*x.float\(\)"),
    "images with labels": (Net, [(x, 3) for x in IMAGES], CalibrationError, "no batch dimension"),
    "a data set": (Net, TensorDataset(IMAGES, CLASSES), CalibrationError, r"TensorDataset, a data set .*DataLoader\("),
    "channels last": (Net, IMAGES.movedim(1, -1), CalibrationError, r"channels last.*x.movedim\(-1, 1\)"),
    "unbatched, channels last": (Net, list(IMAGES.movedim(1, -1)), CalibrationError, "no batch dimension and .* last"),
    "no channels": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)), IMAGES[:, 0], CalibrationError, "unsqueeze"),
    "a wrong size": (
        Two, [(LEFT[:, :5], RIGHT)], CaptureError, r"module 'a'.*cannot be run .* \(float32 \[N, 5\], float32 \[N, 4\], N"
    ),
    "dropout left on": (lambda: Two(0.5), [(LEFT, RIGHT)], CaptureError, "random numbers .* training=self.training"),
    "dropout left on in attention": (
        lambda: Attention(), random(16, 5, 8), CaptureError, "random numbers .* training=self.training"
    ),
    "several inputs": (Several, [(LEFT, RIGHT)], CaptureError, r"\*inputs.* named parameters"),
    "traced": (lambda: torch.jit.trace(Net().eval(), IMAGES[:2]), IMAGES, CaptureError, "pass the original module"),
    "scripted": (lambda: torch.jit.script(Net()), IMAGES, CaptureError, "pass the original module"),
    "scripted in part": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(nn.Conv2d(8, 8, 1))), IMAGES, CaptureError,
        "module '1' is a TorchScript module",
    ),
    "scripted function": (lambda: torch.jit.script(_double), IMAGES, CaptureError, "no torch.nn.Module"),
    "a function": (lambda: F.relu, IMAGES, CaptureError, "function, no torch.nn.Module"),
    "a state dict": (lambda: Net().state_dict(), IMAGES, CaptureError, "OrderedDict, no torch.nn.Module"),
    "an array for a parameter": (
        Optional, [{"x": LEFT, "mask": RIGHT.numpy()}], CalibrationError, "'mask' .* a ndarray: pass a tensor"
    ),
    "an option": (Optional, [{"x": LEFT, "scale": 2.0}], CalibrationError, "'scale' .* a float: an option is fixed"),
    "a parameter that comes later": (
        Optional, [{"x": LEFT[:8]}, {"x": LEFT, "mask": RIGHT}], CalibrationError, r"batch 1 has \['mask'\], which the first"
    ),
    "dtypes that differ": (Net, [IMAGES[:8], IMAGES.double()], CalibrationError, "batch 1 is .*float64.* the first was"),
}  # fmt: skip


def _double(x: Tensor) -> Tensor:
    return x * 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.b(F.scaled_dot_product_attention(h, h, h, dropout_p=0.3))
        return out


@pytest.mark.parametrize("name", list(CAUSES))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_cause_is_named(name: str) -> None:
    make, calibration, error, message = CAUSES[name]
    with pytest.raises(error, match=message) as caught:
        bitdial.quantize(make(), calibration, GREEDY)
    assert type(caught.value) is error and "data-dependent control flow" not in str(caught.value).partition("(operator")[0]


def test_looking_for_the_cause_leaves_no_traces() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(self.norm(x)) + torch.rand(1)

    net, state = Counting().train(), torch.random.get_rng_state()
    with pytest.raises(CalibrationError, match="float64"):
        bitdial.quantize(net, IMAGES.double(), GREEDY)
    assert float(net.calls) == 0 and int(net.norm.num_batches_tracked) == 0 and net.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_exports_own_words_are_kept_where_the_network_runs() -> None:
    class Branch(Two):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.both(x, None) if x.sum() > 0 else -self.both(x, None)

    with pytest.raises(CaptureError, match="data-dependent control flow"):
        bitdial.quantize(Branch(), LEFT, GREEDY)
    samples = gather(LEFT, Branch(), 16)
    with pytest.raises(CaptureError, match="^told$"), causes_named(Branch(), samples):
        raise CaptureError("told")


def test_wrappers_are_taken_off() -> None:
    two = Two()
    assert plain_module(nn.DataParallel(nn.DataParallel(two))) is two and plain_module(torch.compile(two)) is two
    for data in ([(LEFT, RIGHT)], [{"target": RIGHT, "x": LEFT}], DataLoader(TensorDataset(LEFT, RIGHT, CLASSES))):
        assert len(gather(data, plain_module(nn.DataParallel(two)), 16).inputs) == 2
    wrapped = bitdial.quantize(nn.DataParallel(two), [(LEFT, RIGHT)], GREEDY)
    assert wrapped.program.graph.inputs == ["x", "target"]


# name -> (network, calibration data, names of the inputs, what is warned of)
LEFT_OUT: dict[str, tuple[type[nn.Module], Any, list[str], str]] = {
    "a required parameter called target": (Two, [{"x": LEFT, "target": RIGHT}], ["x", "target"], ""),
    "an optional one that counts": (OptionalTarget, [{"x": LEFT, "target": RIGHT}], ["x", "target"], ""),
    "labels that add a loss": (WithLoss, [{"x": LEFT, "labels": CLASSES}], ["x"], r"\['labels'\] is left out as a training"),
    "labels that forward() lacks": (Optional, [{"x": LEFT, "label": CLASSES}], ["x"], ""),
    "an optional parameter": (Optional, [{"x": LEFT, "mask": RIGHT}], ["x", "mask"], ""),
    "an option at its default": (Optional, [{"x": LEFT, "scale": 1.0, "mask": None}], ["x"], ""),
    "one in a tuple": (Optional, [(LEFT, RIGHT)], ["0"], r"optional 'mask' of forward\(\), pass dicts {'x': ..., 'mask': ...}"),
    "more of *inputs": (Several, [(LEFT, RIGHT)], ["0"], r"more of '\*inputs'"),
    "a name that is misspelt": (Optional, [{"x": LEFT, "masc": RIGHT}], ["x"], r"\['masc'\] is left out, since forward\(x, mask"),
    "images and labels": (Net, [(IMAGES, CLASSES)], ["0"], ""),
    "two inputs and labels": (Two, [(LEFT, RIGHT, CLASSES)], ["0", "1"], ""),
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_nothing_that_may_be_an_input_is_left_out_silently(name: str) -> None:
    make, calibration, names, told = LEFT_OUT[name]
    if told:
        with pytest.warns(UserWarning, match=told) as seen:
            samples = gather(calibration, make().eval(), 16)
        assert seen[0].filename == __file__  # the line that called bitdial
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = gather(calibration, make().eval(), 16)
    assert (samples.names or [str(i) for i in range(len(samples.inputs))]) == names


# -- data without content ------------------------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[type[nn.Module], Any, str]] = {
    "zero": (Net, torch.zeros(16, 3, 8, 8), "'x' is all zero in all 16 samples.*pass samples like those"),
    "constant": (Net, torch.full((16, 3, 8, 8), 0.5), r"'x' is constant \(all 0.5\) in all 16 samples.*pass samples"),
    "one sample again and again": (Net, IMAGES[:1].expand(16, 3, 8, 8), "'x' is 16 times the same sample.*pass samples"),
    "one of two": (Two, [(LEFT, torch.zeros(16, 4))], "'target' is all zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EMPTY))
def test_calibration_data_without_content_are_warned_of(name: str) -> None:
    make, calibration, told = EMPTY[name]
    with pytest.warns(UserWarning, match=told) as seen:
        program = bitdial.quantize(make(), calibration, GREEDY).program
    assert seen[0].filename == __file__
    assert program.provenance["warnings"] == [str(w.message) for w in seen]
    page = render_html(collect_report(program, title="a"))
    assert "Read with care" in page and "pass samples like those" in page


def test_layerwise_plans_warn_alike() -> None:
    config = LayerwiseConfig(budget_latency="100%", calibration_images=16)
    with pytest.warns(UserWarning, match="'x' is all zero"):
        compiled = bitdial.compile(nn.DataParallel(Net()), torch.zeros(16, 3, 8, 8), config)
    assert len(compiled.program.provenance["warnings"]) == 1
    with pytest.raises(CalibrationError, match="float64"):
        bitdial.compile(Net(), IMAGES.double(), config)


def test_ordinary_data_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        program = bitdial.quantize(Net(), IMAGES, GREEDY).program
        bitdial.quantize(Net(), IMAGES[:1], GREEDY)  # few, but no sign of a mistake
    assert "warnings" not in program.provenance and "Read with care" not in render_html(collect_report(program, title="a"))


def test_masks_may_be_constant() -> None:
    class Masked(Two):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.both(x, None) * mask.float()[:, :3]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bitdial.quantize(Masked(), [(LEFT, torch.ones(16, 4, dtype=torch.int64))], GREEDY)
