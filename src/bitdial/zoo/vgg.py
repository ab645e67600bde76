"""VGG-style network for 32 x 32 images (Simonyan and Zisserman 2015), with BatchNorm and a mean over the last map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS: tuple[int | None, ...] = (64, 64, None, 128, 128, None, 256, 256, None, 256)


class CifarVGG(nn.Module):
    """3 x 3 convolutions without bias, each with BatchNorm and ReLU; `None` in WIDTHS is a 2 x 2 max pool.

    Input float32 [N, 3, H, W] with H, W >= 8, output float32 logits [N, num_classes]. All layers but the classifier are
    members of one `nn.Sequential` named `features`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if width is None:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.mean(self.features(x), dim=(2, 3)))
        return logits


def vgg(num_classes: int = 10) -> CifarVGG:
    """The VGG with seven convolutions."""
    return CifarVGG(num_classes)
