"""The networks whose latency is measured: built from a name, their inputs, and their .bitdial files.

The large ones have random weights from a fixed seed (weights hardly influence speed), with BatchNorm's shifts set to 1 and
its statistics re-estimated on random images, so that the network carries a signal and its 8-bit ranges are used. The sentence
encoder has its published weights where their package is installed.
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
from peers.inputs import Arrays
from sentence_encoder import ENCODER, SentenceEncoder, encoder_folder, load_encoder

SEED = 0
CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class NetworkSpec:
    """spec: as in `bitdial.zoo.registry`, or ENCODER. size: height and width, or tokens of a sentence. weights: stem of a file of
    trained weights, or None."""

    spec: str
    size: int
    weights: str | None = None

    @property
    def reads_text(self) -> bool:
        return self.spec == ENCODER

    @property
    def transformer(self) -> bool:
        return self.reads_text or any(name in self.spec for name in ("vit", "deit", "swin"))


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
    "minilm_l6_48": NetworkSpec(ENCODER, 48),
    "minilm_l6_128": NetworkSpec(ENCODER, 128),
    "vgg": NetworkSpec("zoo:vgg", 32, "vgg_cifar10_jpeg"),
    "resnet20": NetworkSpec("zoo:resnet20", 32, "resnet20_cifar10_jpeg"),
}


def random_images(n: int, size: int, seed: int) -> Tensor:
    """Smooth random images, float32 [n, 3, size, size]: about what a normalised photograph looks like to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, max(2, size // 4), max(2, size // 4), generator=generator)
    fine = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return fine + 0.3 * torch.randn(n, 3, size, size, generator=generator)


def random_sentences(n: int, tokens: int, seed: int) -> Arrays:
    """Random token numbers and a mask without padding, int64 [n, tokens] each."""
    words = np.random.default_rng(seed).integers(1000, 30000, (n, tokens))  # what lies before stands for no word
    return [words, np.ones_like(words)]


def random_samples(name: str, n: int, seed: int) -> Arrays:
    """One array per input of the network."""
    network = NETWORKS[name]
    if network.reads_text:
        return random_sentences(n, network.size, seed)
    images: npt.NDArray[np.float32] = random_images(n, network.size, seed).numpy()
    return [images]


def calibration(name: str) -> Arrays:
    """What every quantizer is given: few random samples, since their choice moves scales, not speed."""
    return random_samples(name, CALIBRATION_IMAGES, SEED + 1)


def input_batch(name: str, batch: int) -> Arrays:
    """One array per input of the network, the same for every contestant: float32 [batch, 3, H, W] of images."""
    return random_samples(name, batch, SEED + 2)


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
    if network.reads_text:
        folder = encoder_folder()
        return SentenceEncoder().eval() if folder is None else load_encoder(folder)
    model = build_model(network.spec)
    estimate_batch_norm(model, random_images(CALIBRATION_IMAGES, network.size, SEED + 1))
    return model


def quantize_config() -> QuantizeConfig:
    """4 bits, with a cheap search: which groups are low does not influence speed, only how many are."""
    return QuantizeConfig(
        target="paper", selector="greedy", calibration_images=CALIBRATION_IMAGES, search_images=CALIBRATION_IMAGES, batch_size=4
    )


def build_artifact(
    name: str, path: Path, data: Path | None, progress: Callable[[str, float], None], target: str = "paper"
) -> None:
    """Quantize the network and write its .bitdial file."""
    from bitdial.artifact import save_program
    from bitdial.pipeline import prepare, quantize_prepared

    samples, config = [torch.from_numpy(x) for x in calibration(name)], quantize_config().updated(target=target)
    prepared = prepare(float_network(name, data), samples, config, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_program(quantize_prepared(prepared, config, progress=progress), path)
