"""Two residual nets for handwritten digits: a small one, and a wide one that shows what low bits buy.

Every inner layer of the small one has 4 to 8 groups of 16 channels, of the wide one 8 to 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut; a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.projection: nn.Module = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.projection = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.projection(x)
        return F.relu(out)


class DigitsNet(nn.Module):
    """Stem, three residual blocks (64, 128, 128 channels), mean, linear: eight convolutions.

    Input float32 [N, 1, 16, 16] as `bitdial.zoo.digits.load_digits_split` gives it, output logits [N, num_classes].
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.block1 = DigitsBlock(64, 64, stride=1)
        self.block2 = DigitsBlock(64, 128, stride=2)
        self.block3 = DigitsBlock(128, 128, stride=1)
        self.linear = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.block3(self.block2(self.block1(out)))
        logits: Tensor = self.linear(torch.mean(out, dim=(2, 3)))
        return logits


class DigitsWideNet(nn.Module):
    """Stem, residual block of 128 channels, max pooling, residual block of 256, mean, linear: six convolutions.

    Its 3 x 3 convolutions of stride 1 are wide enough for the CPU engine's fast kernels to pay: on one AMD Zen 4 core
    (AVX512-VNNI) ratio 1 was 1.7 times as fast as ratio 0 at batch 1 and 2.0 times at batch 16, the small net 1.2 and 1.5
    times (measured with `bitdial benchmark`).
    Input and output as of `DigitsNet`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 128, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.block1 = DigitsBlock(128, 128, stride=1)
        self.block2 = DigitsBlock(128, 256, stride=1)
        self.linear = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.block2(F.max_pool2d(self.block1(out), 2))
        logits: Tensor = self.linear(torch.mean(out, dim=(2, 3)))
        return logits


def digits(num_classes: int = 10) -> DigitsNet:
    """The small network with fresh random weights (`bitdial.zoo.digits.train_digits` trains it)."""
    return DigitsNet(num_classes)


def digits_wide(num_classes: int = 10) -> DigitsWideNet:
    """The wide network with fresh random weights (`bitdial.zoo.digits.train_digits` trains it)."""
    return DigitsWideNet(num_classes)
