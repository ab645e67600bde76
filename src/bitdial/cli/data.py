"""Data sets for commands: the user's options over what the model was quantized with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.cli.machine import cpu_model
from bitdial.cli.terminal import Terminal
from bitdial.errors import ConfigError, DataError
from bitdial.settings import BaseConfig, setting

if TYPE_CHECKING:
    import torch

    from bitdial.quantization.program import Program
    from bitdial.zoo.datasets import ImageSet, Split
    from bitdial.zoo.preprocessing import Preprocessing

_PANEL = "Data"


class DataOptions(BaseConfig):
    """The data options of a command as given; None where left out."""

    data: str = setting(
        ...,
        "A folder of pictures (with train/ and test/, or train.zip and test.zip), a .zip or .npz file, 'digits', or "
        "torchvision:NAME.",
        "DATA", _PANEL,
    )  # fmt: skip
    mean: tuple[float, ...] | None = setting(
        None,
        "Mean of the pixels (0..1) per channel; one number for grey. Default: what the model was quantized with, else "
        "ImageNet's.",
        "R,G,B", _PANEL, read="numbers",
    )  # fmt: skip
    std: tuple[float, ...] | None = setting(
        None, "Standard deviation of the pixels; defaults as for --mean.", "R,G,B", _PANEL, read="numbers"
    )
    resize: tuple[int, int] | None = setting(
        None, "Picture size the network takes: 224 or 224x320 (height x width). Default: as the pictures are.", "SIZE", _PANEL,
        read="size",
    )  # fmt: skip
    crop: float | None = setting(
        None,
        "With --resize: scale the picture so that the size is this share of its shorter side, and cut the centre out (0.875 is "
        "usual for ImageNet). Default: stretch.",
        "SHARE", _PANEL,
    )  # fmt: skip
    split_seed: int | None = setting(
        None,
        "Seed of the split into train and test where the data have none of their own. Default: the one the model was quantized "
        "with, else 0.",
        "N", _PANEL, ge=0,
    )  # fmt: skip
    data_root: Path | None = setting(None, "Where torchvision: data sets lie. Default: ./data.", "DIR", _PANEL)
    download: bool = setting(False, "Let torchvision fetch the data set if it is not there.", "", _PANEL)

    def preprocessing(self, stored: Mapping[str, Any]) -> Preprocessing | None:
        """Options first, then what the model was quantized with, then ImageNet's mean and std; None for 'digits'."""
        from bitdial.zoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

        given = (self.mean, self.std, self.resize, self.crop)
        if self.data == "digits":
            if any(option is not None for option in given):
                raise ConfigError("--data digits comes ready made: leave --mean, --std, --resize and --crop out")
            return None
        if (self.mean is None) != (self.std is None):
            raise ConfigError("--mean and --std belong together: give both or none")
        known = stored.get("preprocessing") or {}
        mean = self.mean if self.mean is not None else known.get("mean", IMAGENET_MEAN)
        std = self.std if self.std is not None else known.get("std", IMAGENET_STD)
        size = self.resize if self.resize is not None else known.get("size")
        crop = self.crop if self.crop is not None else known.get("crop_fraction")
        return Preprocessing(tuple(mean), tuple(std), None if size is None else (size[0], size[1]), crop)

    def seed_of_split(self, stored: Mapping[str, Any]) -> int:
        """The split must be that of quantization: another would hand calibration images to the evaluation."""
        return self.split_seed if self.split_seed is not None else int(stored.get("split_seed", 0))

    def load(self, split: Split, stored: Mapping[str, Any] | None = None) -> ImageSet:
        """The images of a split. `stored`: provenance["source"] of the model, if any. Raises DataError, ConfigError."""
        from bitdial.zoo.datasets import load_dataset

        known = stored or {}
        return load_dataset(
            self.data,
            split,
            self.preprocessing(known),
            seed=self.seed_of_split(known),
            root=self.data_root,
            download=self.download,
        )

    def drawn(
        self, split: Split, n: int | None, seed: int, stored: Mapping[str, Any] | None = None, *programs: Program
    ) -> tuple[ImageSet, dict[str, Any]]:
        """(`n` images of a split, as `draw` has them; JSON-able: what tells whether another evaluation saw the same). The whole
        split is checked against `programs` (`check_fit`). Raises DataError, ConfigError."""
        everything = self.load(split, stored)
        for program in programs:
            check_fit(program, everything)
        used = draw(everything, n, seed)
        record = {"split": split, "images": len(used), "of": len(everything), "seed": seed}
        return used, {**self.describe(stored), **record}

    def test_images(
        self, wanted: bool | None, n: int, seed: int, terminal: Terminal, stored: Mapping[str, Any] | None = None
    ) -> tuple[ImageSet | None, dict[str, Any]]:
        """`drawn` of the test part; (None, {}) for no evaluation. Raises DataError if one was asked for and cannot be."""
        if wanted is not False:
            try:
                return self.drawn("test", n, seed, stored)
            except DataError as error:
                if wanted:
                    raise
                terminal.note(f"note: no evaluation ({error})")
        return None, {}

    def describe(self, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """JSON-able: what a later evaluation needs to read the same data in the same way (no folder names)."""
        known = stored or {}
        settings = self.preprocessing(known)
        return {
            "data": short_name(self.data),
            "split_seed": self.seed_of_split(known),
            "preprocessing": None
            if settings is None
            else {
                "mean": list(settings.mean),
                "std": list(settings.std),
                "size": None if settings.size is None else list(settings.size),
                "crop_fraction": settings.crop_fraction,
            },
        }


def name_sources(program: Program, spec: str, weights: Path | None, given: DataOptions) -> None:
    """Write into a new program's provenance what it is made from (no folder names), and by which processor."""
    program.provenance["cpu"] = cpu_model()
    program.provenance["source"] = {
        "model": spec.replace("\\", "/").rpartition("/")[2] if ".py:" in spec or spec.lower().endswith(".onnx") else spec,
        "weights": None if weights is None else weights.name,
        **given.describe(),
    }


def short_name(spec: str) -> str:
    """The last part of a path; other specs as they are. Artifacts travel, and need not tell about folders."""
    return spec if spec == "digits" or spec.startswith("torchvision:") else Path(spec).absolute().name


@dataclass(frozen=True)
class Batches:
    """(images, labels) as torch tensors, read anew on every pass, so that large sets need not fit into memory."""

    images: ImageSet
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        for pixels, labels in self.images.batches(self.size):
            yield torch.from_numpy(pixels), torch.from_numpy(labels)


def draw(images: ImageSet, n: int | None, seed: int) -> ImageSet:
    """`n` images drawn by the seed; the whole set in its order if None or as many."""
    return images if n is None or n >= len(images) else images.shuffled(seed).head(n)


def check_fit(program: Program, images: ImageSet) -> None:
    """Raise DataError if the images have another shape, or more classes, than the program takes and tells apart."""
    if len(program.inputs) != 1:
        raise DataError(
            f"the model takes {len(program.inputs)} inputs; measure it from Python with QuantizedModel.evaluate"
        )
    wanted = program.types[program.inputs[0]].shape[1:]
    if (
        any(isinstance(w, int) and w != got for w, got in zip(wanted, images.image_shape, strict=False))
        or len(wanted) != 3
    ):
        got_text, wanted_text = "x".join(map(str, images.image_shape)), "x".join(map(str, wanted))
        raise DataError(
            f"the images of {images.name} are {got_text} (channels x height x width), the model takes {wanted_text}; "
            "use --resize, or one --mean and --std per channel"
        )
    outputs = program.types[program.outputs[0]].shape
    classes = outputs[-1] if len(outputs) == 2 else None
    if isinstance(classes, int) and int(images.labels.max()) >= classes:
        raise DataError(
            f"{images.name} has labels up to {int(images.labels.max())}, the model tells {classes} classes apart; "
            "give the data set that the model was trained for"
        )
