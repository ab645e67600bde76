"""Structure of the zoo's networks, and their trained weights where the data folder is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitdial.errors import ConfigError
from bitdial.zoo.architectures import ARCHITECTURES, INPUT_SHAPES, CifarResNet, DigitsNet
from bitdial.zoo.datasets import load_dataset
from bitdial.zoo.registry import build_model
from bitdial.zoo.resnet import PaddedShortcut

TRAINED = [
    ("resnet20", "resnet20_cifar10_published"),
    ("resnet20", "resnet20_cifar10_jpeg"),
    ("resnet56", "resnet56_cifar10_published"),
    ("resnet56", "resnet56_cifar10_jpeg"),
    ("vgg", "vgg_cifar10_jpeg"),
    ("vit", "vit_cifar10_jpeg"),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_shape(name: str) -> None:
    model = ARCHITECTURES[name](7).eval()
    with torch.inference_mode():
        out = model(torch.randn(3, *INPUT_SHAPES[name]))
    assert out.shape == (3, 7)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_resnet_parameter_count_of_the_paper(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_depth_must_fit(depth: int) -> None:
    with pytest.raises(ConfigError, match="6n \\+ 2"):
        CifarResNet(depth)


def test_padded_shortcut_subsamples_and_pads_both_sides() -> None:
    x = torch.arange(2 * 4 * 6 * 6, dtype=torch.float32).reshape(2, 4, 6, 6)
    out = PaddedShortcut(2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_every_inner_layer_of_the_demo_network_has_four_groups_of_16() -> None:
    convs = [(n, m) for n, m in DigitsNet().named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 8
    assert all(m.in_channels >= 64 and m.in_channels % 16 == 0 for n, m in convs if n != "conv1")


@pytest.mark.parametrize(("name", "file"), TRAINED)
def test_trained_weights_load_completely(data_folder: Path, name: str, file: str) -> None:
    path = data_folder / "weights" / f"{file}.safetensors"
    state = build_model(f"zoo:{name}", path).state_dict()
    stored = load_file(str(path))
    assert {n for n in state if n not in stored and not n.endswith("num_batches_tracked")} == set()
    assert all(torch.equal(state[n], tensor) for n, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "file", "top1"),
    [
        ("resnet20", "resnet20_cifar10_jpeg", 87.65),
        ("vgg", "vgg_cifar10_jpeg", 87.31),
        ("vit", "vit_cifar10_jpeg", 79.82),
    ],
)
def test_trained_accuracy(data_folder: Path, tmp_path: Path, name: str, file: str, top1: float) -> None:
    """500 images: one standard error is 1.5 to 1.8 points; the band is three of them."""
    model = build_model(f"zoo:{name}", data_folder / "weights" / f"{file}.safetensors")
    images = load_dataset(data_folder / "cifar10", "test").shuffled(0).head(500)
    with torch.inference_mode():
        hits = sum(
            int((model(torch.from_numpy(x)).argmax(1).numpy() == y).sum()) for x, y in images.batches(batch_size=125)
        )
    assert abs(hits / 5 - top1) < 5.0
