"""The zoo's own networks by name. Each constructor takes `num_classes`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bitdial.zoo.digits_net import DigitsNet, DigitsWideNet, digits, digits_wide
from bitdial.zoo.resnet import CifarResNet, resnet20, resnet56
from bitdial.zoo.vgg import CifarVGG, vgg
from bitdial.zoo.vit import CifarViT, vit

__all__ = [
    "ARCHITECTURES",
    "HEADS",
    "INPUT_SHAPES",
    "CifarResNet",
    "CifarVGG",
    "CifarViT",
    "DigitsNet",
    "DigitsWideNet",
    "digits",
    "digits_wide",
    "resnet20",
    "resnet56",
    "vgg",
    "vit",
]

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg": vgg,
    "vit": vit,
    "digits": digits,
    "digits_wide": digits_wide,
}

# Name of the last linear layer's weight [classes, features]: tells the number of classes of a weights file.
HEADS: dict[str, str] = {
    "resnet20": "linear.weight",
    "resnet56": "linear.weight",
    "vgg": "classifier.weight",
    "vit": "head.weight",
    "digits": "linear.weight",
    "digits_wide": "linear.weight",
}

# Channels, height, width the network was made for.
INPUT_SHAPES: dict[str, tuple[int, int, int]] = {
    "resnet20": (3, 32, 32),
    "resnet56": (3, 32, 32),
    "vgg": (3, 32, 32),
    "vit": (3, 32, 32),
    "digits": (1, 16, 16),
    "digits_wide": (1, 16, 16),
}
