"""The networks whose latency is measured: built from a name, their inputs, and their .bitdial files.

The large ones have random weights from a fixed seed (weights hardly influence speed), with BatchNorm's shifts set to 1 and
its statistics re-estimated on random images, so that the network carries a signal and its 8-bit ranges are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitdial.quantization.config import QuantizeConfig
from bitdial.zoo.registry import build_model

SEED = 0
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class NetworkSpec:
    """spec: as in `bitdial.zoo.registry`. size: height and width. weights: stem of a file of trained weights, or None."""

    spec: str
    size: int
    weights: str | None = None


NETWORKS: dict[str, NetworkSpec] = {
    "resnet18": NetworkSpec("torchvision:resnet18", 224),
    "resnet50": NetworkSpec("torchvision:resnet50", 224),
    "vgg16_bn": NetworkSpec("torchvision:vgg16_bn", 224),
    "mobilenet_v2": NetworkSpec("torchvision:mobilenet_v2", 224),
    "efficientnet_lite0": NetworkSpec("timm:efficientnet_lite0", 224),
    "squeezenet1_1": NetworkSpec("torchvision:squeezenet1_1", 224),
    "vit_s": NetworkSpec("timm:vit_small_patch16_224", 224),
    "vit_b": NetworkSpec("timm:vit_base_patch16_224", 224),
    "deit_s": NetworkSpec("timm:deit_small_patch16_224", 224),
    "swin_t": NetworkSpec("timm:swin_tiny_patch4_window7_224", 224),
    "swin_s": NetworkSpec("timm:swin_small_patch4_window7_224", 224),
    "vgg": NetworkSpec("zoo:vgg", 32, "vgg_cifar10_jpeg"),
    "resnet20": NetworkSpec("zoo:resnet20", 32, "resnet20_cifar10_jpeg"),
}


def random_images(n: int, size: int, seed: int) -> Tensor:
    """Smooth random images, float32 [n, 3, size, size]: about what a normalised photograph looks like to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, max(2, size // 4), max(2, size // 4), generator=generator)
    fine = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return fine + 0.3 * torch.randn(n, 3, size, size, generator=generator)


def input_batch(name: str, batch: int) -> npt.NDArray[np.float32]:
    """float32 [batch, 3, H, W], the same for every contestant."""
    images: npt.NDArray[np.float32] = random_images(batch, NETWORKS[name].size, SEED + 2).numpy()
    return images


def estimate_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Re-estimate BatchNorm's statistics in one pass; leaves the model in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, 1.0)
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    with torch.no_grad():
        model(images)
    model.eval()


def float_network(name: str, data: Path | None) -> nn.Module:
    """The float32 network in evaluation mode. data: the data folder, for trained weights."""
    network = NETWORKS[name]
    if network.weights is not None and data is not None:
        return build_model(network.spec, data / "weights" / f"{network.weights}.safetensors")
    torch.manual_seed(SEED)
    model = build_model(network.spec)
    estimate_batch_norm(model, random_images(CALIBRATION_IMAGES, network.size, SEED + 1))
    return model


def quantize_config() -> QuantizeConfig:
    """4 bits, with a cheap search: which groups are low does not influence speed, only how many are."""
    return QuantizeConfig(
        target="paper", selector="greedy", calibration_images=CALIBRATION_IMAGES, search_images=CALIBRATION_IMAGES, batch_size=4
    )


def build_artifact(name: str, path: Path, data: Path | None, progress: Callable[[str, float], None]) -> None:
    """Quantize the network and write its .bitdial file."""
    import bitdial

    model = float_network(name, data)
    images = random_images(CALIBRATION_IMAGES, NETWORKS[name].size, SEED + 1)
    quantized = bitdial.quantize(model, images, quantize_config(), progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    quantized.save(path)
