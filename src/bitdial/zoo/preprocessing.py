"""From decoded pictures to network inputs: channels, size, and normalisation. NumPy and Pillow only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: decode to `channels`, resize, (x / 255 - mean) / std.

    mean, std      one number per channel; 3 numbers mean RGB, 1 number means grey. The defaults are ImageNet's
    size           (height, width), or None to keep the pictures as they are (all must then have one size)
    crop_fraction  None: pictures are stretched to `size`. A number in (0, 1]: the picture is scaled so that `size` is
                   this share of its shorter side, and the centre is cut out (0.875 is usual for ImageNet)

    Raises ConfigError for settings out of range.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    crop_fraction: float | None = None

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ConfigError(
                f"mean has {len(self.mean)} and std {len(self.std)} numbers; give one (grey) or three (RGB) for each"
            )
        if not all(math.isfinite(v) for v in self.mean) or not all(math.isfinite(v) and v > 0 for v in self.std):
            raise ConfigError(f"mean {self.mean} must be finite and std {self.std} finite and above zero")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigError(f"size {self.size} must be two positive numbers: height and width")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction {self.crop_fraction} must lie above 0 and not above 1")
        if self.crop_fraction is not None and self.size is None:
            raise ConfigError("crop_fraction needs a size; give the network's input height and width")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def decode_key(self) -> str:
        """The settings that change the stored uint8 pixels (normalisation does not)."""
        return f"channels={self.channels} size={self.size} crop={self.crop_fraction}"

    def pixels(self, image: Image) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, channels] of a Pillow image, resized as the settings say."""
        from PIL import Image as pillow

        converted = image.convert("RGB" if self.channels == 3 else "L")
        if self.size is not None:
            height, width = self.size
            if self.crop_fraction is None:
                if converted.size != (width, height):
                    converted = converted.resize((width, height), pillow.Resampling.BILINEAR)
            else:
                scale = max(height / converted.height, width / converted.width) / self.crop_fraction
                scaled_w = max(width, round(converted.width * scale))
                scaled_h = max(height, round(converted.height * scale))
                converted = converted.resize((scaled_w, scaled_h), pillow.Resampling.BILINEAR)
                left, top = (scaled_w - width) // 2, (scaled_h - height) // 2
                converted = converted.crop((left, top, left + width, top + height))
        array = np.asarray(converted, dtype=np.uint8)
        return array.reshape(array.shape[0], array.shape[1], self.channels)

    def normalise(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """uint8 [N, H, W, channels] -> float32 [N, channels, H, W]."""
        mean = np.asarray(self.mean, dtype=np.float32)
        std = np.asarray(self.std, dtype=np.float32)
        values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
