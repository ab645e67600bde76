"""Residual networks for 32 x 32 images (He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2).

The shortcut where the number of channels grows is their option A: every second pixel of the input, with zero channels
added on both sides. It has no parameters. Parameter names are those of the widely used CIFAR checkpoints: `conv1`,
`bn1`, `layer1.0.conv1`, ..., `linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdial.errors import ConfigError


class PaddedShortcut(nn.Module):
    """Option A: [N, C, H, W] -> [N, C + 2 * pad, ceil(H / 2), ceil(W / 2)], `pad` zero channels on each side."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to the shortcut before the last ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        changes_shape = stride != 1 or in_planes != planes
        self.shortcut: nn.Module = PaddedShortcut(planes // 4) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of 16, 32 and 64 channels.

    Input float32 [N, 3, H, W] (32 x 32 in the paper), output float32 logits [N, num_classes].
    Raises ConfigError for a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(f"depth {depth} is not of the form 6n + 2; use 20, 32, 44, 56 or 110")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, stride=1)
        self.layer2 = self._stage(16, 32, n, stride=2)
        self.layer3 = self._stage(32, 64, n, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(torch.mean(out, dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-20, 0.27 M parameters."""
    return CifarResNet(20, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-56, 0.85 M parameters."""
    return CifarResNet(56, num_classes)
