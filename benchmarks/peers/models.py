"""The files that contestants run, made once and kept in a cache folder: ONNX float32, ONNX int8 (QDQ), OpenVINO int8 (NNCF),
.bitdial, and the input batches.

Both int8 quantizers get the same few random images: the choice of images moves scales, not speed. Each maker imports its
library when it runs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peers.networks import (
    CALIBRATION_IMAGES,
    NETWORKS,
    SEED,
    build_artifact,
    float_network,
    input_batch,
    quantize_config,
    random_images,
)
from results import settings_hash

Maker = Callable[[Path], None]


class ModelFiles:
    """Makes files in `folder` when they are first asked for. data: the data folder, for trained weights (or None)."""

    def __init__(self, folder: Path, data: Path | None, progress: Callable[[str, float], None]) -> None:
        self.folder, self.data, self.progress = folder, data, progress

    def _made(self, name: str, suffix: str, make: Maker, *, parts: tuple[str, ...] = ()) -> Path:
        """The file NAME+SUFFIX; made under another name first, so that a cache never holds half a file.

        parts: suffixes of files that `make` writes beside it under the same stem.
        """
        target = self.folder / f"{name}{suffix}"
        if target.exists():
            return target
        self.progress(f"making {target.name}", 0.0)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n", encoding="ascii")  # nothing of a cache belongs to the project
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".making-") as folder:
            partial = Path(folder) / target.name
            make(partial)
            for part in parts:  # the file that names the others comes last
                os.replace(partial.with_suffix(part), target.with_suffix(part))
            os.replace(partial, target)
        return target

    def _stem(self, network: str) -> str:
        trained = NETWORKS[network].weights is not None and self.data is not None
        return f"{network}.{'trained' if trained else 'random'}"

    def inputs(self, network: str, batch: int) -> Path:
        """float32 [batch, 3, H, W] as .npy."""

        def make(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, input_batch(network, batch))

        return self._made(f"{network}.inputs{batch}", ".npy", make)

    def artifact(self, network: str) -> Path:
        """The .bitdial file."""
        digest = settings_hash(quantize_config().model_dump(mode="json"))[:8]

        def make(path: Path) -> None:
            build_artifact(network, path, self.data, lambda stage, share: self.progress(f"{network}: {stage}", share))

        return self._made(f"{self._stem(network)}.{digest}", ".bitdial", make)

    def onnx(self, network: str) -> Path:
        """float32, batch dimension "N"."""

        def make(path: Path) -> None:
            model = float_network(network, self.data)
            axes = {"input": {0: "N"}, "output": {0: "N"}}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this exporter is the older one; it needs no further package
                torch.onnx.export(
                    model, (torch.from_numpy(input_batch(network, 2)),), str(path), dynamo=False,
                    input_names=["input"], output_names=["output"], dynamic_axes=axes, opset_version=17,
                )  # fmt: skip

        return self._made(self._stem(network), ".onnx", make)

    def onnx_int8(self, network: str) -> Path:
        """Quantize/dequantize pairs: unsigned activations, signed weights per channel, by ONNX Runtime's quantizer."""

        def make(path: Path) -> None:
            from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            prepared = path.with_name("prepared.onnx")
            quant_pre_process(str(self.onnx(network)), str(prepared))
            quantize_static(
                str(prepared),
                str(path),
                _Reader(network),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )

        return self._made(f"{self._stem(network)}.qdq", ".onnx", make)

    def openvino_int8(self, network: str) -> Path:
        """OpenVINO's own format, quantized by NNCF (needs nncf)."""

        def make(path: Path) -> None:
            import nncf
            import openvino

            images = [image[None] for image in calibration(network)]
            model = openvino.Core().read_model(str(self.onnx(network)))
            dataset = nncf.Dataset(images, lambda image: image)
            quantized = nncf.quantize(
                model, dataset, subset_size=len(images), target_device=nncf.TargetDevice.CPU,
                preset=nncf.QuantizationPreset.PERFORMANCE,
            )  # fmt: skip
            openvino.save_model(quantized, str(path))

        return self._made(f"{self._stem(network)}.nncf", ".xml", make, parts=(".bin",))


def calibration(network: str) -> npt.NDArray[np.float32]:
    """float32 [images, 3, H, W], as bitdial's own artifacts are calibrated on."""
    images: npt.NDArray[np.float32] = random_images(CALIBRATION_IMAGES, NETWORKS[network].size, SEED + 1).numpy()
    return images


class _Reader:
    """Calibration images one at a time, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, network: str) -> None:
        self.images: Iterator[Any] = iter(calibration(network))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {"input": image[None]}
