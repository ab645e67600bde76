"""scikit-learn's handwritten digits as network inputs: 1,797 real scans, 8 x 8, enlarged to 16 x 16. No torch.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998; its 1,797 test images come with scikit-learn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitdial.errors import DataError
from bitdial.zoo.datasets import split_positions

TEST_IMAGES = 360
# Mean and standard deviation of the enlarged pixels, scaled to 0..1.
MEAN, STD = 0.3053, 0.319

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def load_digits_arrays(seed: int = 0) -> tuple[Images, Labels, tuple[Labels, Labels]]:
    """All images float32 [1797, 1, 16, 16], normalised, labels int64 [1797], and the positions (train, test).

    The split is stratified: 1,437 train and 360 test images. Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set 'digits' comes with scikit-learn; run: pip install 'bitdial[demo]'") from error
    bunch = load_digits()
    pixels = np.asarray(bunch.images, dtype=np.float32) / np.float32(16)
    labels = np.asarray(bunch.target, dtype=np.int64)
    images = (enlarge(pixels) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(images[:, None]), labels, split_positions(labels, TEST_IMAGES, seed)


def load_digits_split(seed: int = 0) -> tuple[Images, Labels, Images, Labels]:
    """Train images and labels, test images and labels (see `load_digits_arrays`)."""
    images, labels, (train, test) = load_digits_arrays(seed)
    return images[train], labels[train], images[test], labels[test]


def enlarge(pixels: Images) -> Images:
    """Bilinear interpolation to twice the size (centres at half steps, edges repeated): [N, H, W] -> [N, 2H, 2W]."""
    for axis in (1, 2):
        before = np.concatenate([pixels.take([0], axis), pixels], axis).take(range(pixels.shape[axis]), axis)
        after = np.concatenate([pixels, pixels.take([-1], axis)], axis).take(range(1, pixels.shape[axis] + 1), axis)
        near = np.float32(0.75) * pixels
        pair = np.stack([near + np.float32(0.25) * before, near + np.float32(0.25) * after], axis + 1)
        shape = list(pixels.shape)
        shape[axis] *= 2
        pixels = pair.reshape(shape)
    return pixels
