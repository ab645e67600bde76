"""Whole networks: real architectures with random weights, small variants here, the large ones behind the slow marker.

Randomly initialised deep networks with BatchNorm amplify small differences, in float already: 40 dB of noise on the input
leaves 9 dB at the output of MobileNetV2 or ResNet-50, so no 8-bit model could reach 20. BatchNorm's statistics are
therefore re-estimated on the calibration data, and its shifts set to 1, which keeps most units in the linear part of
their ReLU; the float network's own answer to input noise is measured too, so that a badly conditioned one is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitdial
from bitdial.engines.reference.executor import Executor
from bitdial.graph.operators import MOVEMENT


@dataclass(frozen=True)
class Architecture:
    """build: the network. ends: module paths of the first and last layers. floor: least SNR of the 8-bit model in dB."""

    build: Callable[[], nn.Module]
    size: int
    ends: tuple[str, ...]
    floor: float = 20.0


def tv(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(name, weights=None, **options)
        return model

    return build


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm as library

        model: nn.Module = library.create_model(name, pretrained=False, **options)
        return model

    return build


def small_vgg() -> nn.Module:
    """VGG-11 with BatchNorm at half its width, for 32x32 images."""
    from torchvision.models import vgg

    model: Any = vgg.VGG(
        vgg.make_layers([32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"], batch_norm=True)
    )
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
    return model  # type: ignore[no-any-return]


def small_swin() -> nn.Module:
    return timm(
        "swin_tiny_patch4_window7_224",
        img_size=64, window_size=4, embed_dim=32, depths=(2, 2, 2), num_heads=(2, 4, 8), num_classes=20,
    )()  # fmt: skip


VIT = ("patch_embed.proj", "head")
SMALL = {
    "resnet18": Architecture(tv("resnet18", num_classes=50), 64, ("conv1", "fc")),
    "mobilenet_v2": Architecture(tv("mobilenet_v2", num_classes=50), 64, ("features.0.0", "classifier.1")),
    "squeezenet1_1": Architecture(tv("squeezenet1_1", num_classes=50), 64, ("features.0", "classifier.1")),
    "vgg11_bn": Architecture(small_vgg, 32, ("features.0", "classifier.3")),
    "vit_tiny": Architecture(timm("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=20), 64, VIT, 15.0),
    "deit_tiny_distilled": Architecture(
        timm("deit_tiny_distilled_patch16_224", img_size=64, depth=3, num_classes=20), 64, (*VIT, "head_dist"), 15.0
    ),
    "swin": Architecture(small_swin, 64, ("patch_embed.proj", "head.fc"), 15.0),
}
LARGE = {
    "resnet34": Architecture(tv("resnet34"), 224, ("conv1", "fc")),
    "resnet50": Architecture(tv("resnet50"), 224, ("conv1", "fc")),
    "mobilenet_v2_224": Architecture(tv("mobilenet_v2"), 224, ("features.0.0", "classifier.1")),
    "squeezenet1_1_224": Architecture(tv("squeezenet1_1"), 224, ("features.0", "classifier.1")),
    "vgg16_bn": Architecture(tv("vgg16_bn"), 224, ("features.0", "classifier.6")),
    "vit_small": Architecture(timm("vit_small_patch16_224"), 224, VIT, 15.0),
    "vit_base": Architecture(timm("vit_base_patch16_224"), 224, VIT, 15.0),
    "deit_small": Architecture(timm("deit_small_patch16_224"), 224, VIT, 15.0),
    "deit_base": Architecture(timm("deit_base_patch16_224"), 224, VIT, 15.0),
    "swin_small": Architecture(timm("swin_small_patch4_window7_224"), 224, ("patch_embed.proj", "head.fc"), 15.0),
    "swin_base": Architecture(timm("swin_base_patch4_window7_224"), 224, ("patch_embed.proj", "head.fc"), 15.0),
}
SLACK = 0.75  # dB by which the SNR may rise from one ratio to the next: noise of a few images


class Recorder(Executor):
    """Keeps accumulators and inputs of every conv and linear layer."""

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self.seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def accumulators(self, step: Any, values: Any, setting: Any, batch: int) -> Tensor:
        acc = super().accumulators(step, values, setting, batch)
        if setting is not None:
            self.seen[step.name] = (
                acc.double().numpy().astype(np.int64),
                values[step.inputs[0]].numpy().astype(np.int64),
            )
        return acc


def check_architecture(
    name: str, architecture: Architecture, helpers: Any, oracle: ModuleType, images: int, **settings: Any
) -> None:
    torch.manual_seed(0)
    model = architecture.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 1.0)
    calibration = helpers.images(images, architecture.size, seed=1)
    test = helpers.images(8, architecture.size, seed=2)
    helpers.estimate(model, calibration)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = bitdial.QuantizeConfig(
        target="paper", selector="greedy", calibration_images=images, search_images=8, batch_size=8, **settings
    )
    qm = bitdial.quantize(model, calibration, config)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "the caller's model was changed"
    description = qm.describe()
    json.dumps(description)

    check_signal(name, model, qm, test, architecture.floor, helpers)
    check_layers(model, qm, description, architecture)
    check_accumulators(qm, test[:2], oracle)
    gathers = [n.name for n in qm.program.graph.nodes if n.op == "gather"]
    assert description["reorders"] == gathers
    assert list(qm.program.provenance["layout"]["reorders"]) == gathers
    single = torch.cat([qm(x[None], ratio=0.5) for x in test[:3]])
    together = qm(test[:3], ratio=0.5)
    if architecture.floor == 20.0:  # integers all along: an answer does not depend on the other samples
        assert torch.equal(single, together)
    else:  # LayerNorm and softmax in float: sums may be ordered differently
        assert helpers.snr(single, together) > 30.0


def check_signal(name: str, model: nn.Module, qm: Any, test: Tensor, floor: float, helpers: Any) -> None:
    with torch.no_grad():
        exact = model(test)
        noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(3))
        conditioning = helpers.snr(exact, model(test + 0.01 * noise * test.pow(2).mean().sqrt()))
    assert conditioning > 30.0, f"{name}: the float network turns 40 dB of input noise into {conditioning:.1f} dB"
    outputs = [qm(test, ratio=r) for r in qm.ratios]
    snr = [helpers.snr(exact, y) for y in outputs]
    # what differs between the images, so that a constant answer could not pass
    varying = [helpers.snr(exact - exact.mean(0), y - y.mean(0)) for y in outputs]
    print(f"{name}: SNR {[round(v, 1) for v in snr]} dB, between images {[round(v, 1) for v in varying]} dB")
    assert snr[0] >= floor
    assert varying[0] >= 10.0
    assert all(b <= a + SLACK for a, b in zip(snr[:-1], snr[1:], strict=True)), snr
    assert snr[-1] < snr[0] - 3.0  # the low end is really lower


def check_layers(model: nn.Module, qm: Any, description: dict[str, Any], architecture: Architecture) -> None:
    """Every conv and linear module is an integer layer; all but the ends and depthwise ones go low as a whole."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    layers = {entry["source"]: entry for entry in description["layers"] if entry["kind"] != "matmul"}
    assert set(layers) == set(modules)
    depthwise = {n for n, m in modules.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1}
    assert {n for n, entry in layers.items() if entry["reason"]} == depthwise | set(architecture.ends)
    for source, entry in layers.items():
        layer = qm.program.layers[entry["name"]]
        assert list(layer.weight.shape) == list(modules[source].weight.shape)
        assert entry["macs"] == int(layer.group_macs.sum()) > 0
        assert not layer.low[0].any() and (layer.low[:-1] <= layer.low[1:]).all()
        assert layer.low[-1].all() if layer.eligible else not layer.low.any()
        assert entry["low_groups"][-1] == (entry["groups"] if layer.eligible else 0)
        assert (
            entry["precision"]
            and entry["input"]
            and entry["output"]
            and len(entry["activation_shift"]) == entry["groups"]
        )
        assert sum(entry["weight_shift_histogram"].values()) == layer.weight_shift.size
    share = description["eligible_share"]
    assert share[0] == 0.0 and share[-1] == 1.0
    assert all(abs(s - r) < 0.02 for s, r in zip(share, qm.ratios, strict=True)), share
    listed = {entry["name"] for entry in description["float_operators"]}
    assert all(entry["reason"] for entry in description["float_operators"])
    integer = {*qm.program.layers, *qm.program.qparams}
    moved = MOVEMENT | {"quantize", "dequantize"}
    assert {n.name for n in qm.program.graph.nodes if n.name not in integer and n.op not in moved} == listed


def check_accumulators(qm: Any, images: Tensor, oracle: ModuleType) -> None:
    """A sample of every layer's accumulators at three ratios equals the plain int64 loop."""
    rng = np.random.default_rng(0)
    for index in (0, len(qm.ratios) // 2, len(qm.ratios) - 1):
        recorder = Recorder(qm.program)
        with torch.no_grad():
            recorder.run([images], recorder.settings(index))
        assert set(recorder.seen) == {n for n, layer in qm.program.layers.items() if layer.weight is not None}
        for name, (acc, x) in recorder.seen.items():
            layer, node = qm.program.layers[name], qm.program.graph.node(name)
            signed = qm.program.qparams[node.inputs[0]].signed
            slow = oracle.LayerOracle(layer, node.attrs, x, signed, qm.program.extraction)
            for flat in rng.integers(0, acc.size, 4):
                at = tuple(int(i) for i in np.unravel_index(flat, acc.shape))
                assert slow.accumulator(at, layer.low[index]) == acc[at], f"{name} at {at}, ratio index {index}"


@pytest.mark.parametrize("name", list(SMALL))
def test_small(name: str, helpers: Any, oracle: ModuleType) -> None:
    check_architecture(name, SMALL[name], helpers, oracle, 16, ratios=(0.5, 1.0), low_weights="derived")  # for time


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LARGE))
def test_large(name: str, helpers: Any, oracle: ModuleType) -> None:
    check_architecture(name, LARGE[name], helpers, oracle, 8)
