"""The files that contestants run, made once and kept in a cache folder: ONNX float32, ONNX int8 (QDQ), OpenVINO int8 (NNCF),
.bitdial, and the input batches.

Each maker imports its library when it runs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from peers.inputs import write_inputs
from peers.networks import (
    NETWORKS,
    build_artifact,
    calibration,
    float_network,
    input_batch,
    quantize_config,
)
from results import settings_hash
from sentence_encoder import encoder_folder

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
        spec = NETWORKS[network]
        trained = encoder_folder() is not None if spec.reads_text else spec.weights is not None and self.data is not None
        return f"{network}.{'trained' if trained else 'random'}"

    def inputs(self, network: str, batch: int) -> Path:
        """The input batch, see `peers.inputs`."""

        def make(path: Path) -> None:
            write_inputs(path, input_batch(network, batch))

        return self._made(f"{network}.inputs{batch}", ".npz", make)

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
            samples = tuple(torch.from_numpy(x) for x in input_batch(network, 2))
            names = [f"input{i}" for i in range(len(samples))]
            axes = {name: {0: "N"} for name in (*names, "output")}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this exporter is the older one; it needs no further package
                torch.onnx.export(
                    model, samples, str(path), dynamo=False,
                    input_names=names, output_names=["output"], dynamic_axes=axes, opset_version=17,
                )  # fmt: skip

        return self._made(self._stem(network), ".onnx", make)

    def onnx_int8(self, network: str) -> Path:
        """Quantize/dequantize pairs: unsigned activations, signed weights per channel, by ONNX Runtime's quantizer."""

        def make(path: Path) -> None:
            from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            prepared = path.with_name("prepared.onnx")
            quant_pre_process(str(self.onnx(network)), str(prepared), skip_symbolic_shape=NETWORKS[network].transformer)
            quantize_static(
                str(prepared),
                str(path),
                _Reader(network),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["Conv", "Gather", "Gemm", "MatMul"] if NETWORKS[network].transformer else None,
            )

        return self._made(f"{self._stem(network)}.qdq", ".onnx", make)

    def openvino_int8(self, network: str) -> Path:
        """OpenVINO's own format, quantized by NNCF (needs nncf)."""

        def make(path: Path) -> None:
            import nncf
            import openvino

            items = list(_Reader(network).items)
            model = openvino.Core().read_model(str(self.onnx(network)))
            quantized = nncf.quantize(
                model, nncf.Dataset(items), subset_size=len(items), target_device=nncf.TargetDevice.CPU,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER if NETWORKS[network].transformer else None,
            )  # fmt: skip
            openvino.save_model(quantized, str(path))

        return self._made(f"{self._stem(network)}.nncf", ".xml", make, parts=(".bin",))


class _Reader:
    """Calibration samples one at a time, by the inputs' names, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, network: str) -> None:
        samples = calibration(network)
        self.items: Iterator[dict[str, Any]] = (
            {f"input{i}": x[n : n + 1] for i, x in enumerate(samples)} for n in range(len(samples[0]))
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)
