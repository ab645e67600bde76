"""NNCF quantizes a float ONNX model to int8 for OpenVINO, whose CPU plug-in then runs it. Needs neither torch nor bitdial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.preparation import timed


class NncfPreparation:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: model (.onnx), samples (.npy files, one per input), transformer, artifact (.xml to write), threads."""
        import nncf
        import openvino as ov

        self.threads = settings["threads"]
        core = ov.Core()
        samples = [np.load(path) for path in settings["samples"]]
        model = core.read_model(settings["model"])
        names = [port.get_any_name() for port in model.inputs]
        items = [dict(zip(names, (x[i : i + 1] for x in samples), strict=True)) for i in range(len(samples[0]))]
        made = []

        def work() -> None:
            quantized = nncf.quantize(
                model, nncf.Dataset(items), subset_size=len(items), target_device=nncf.TargetDevice.CPU,
                model_type=nncf.ModelType.TRANSFORMER if settings["transformer"] else None,
            )  # fmt: skip
            ov.save_model(quantized, settings["artifact"], compress_to_fp16=False)
            made.append(quantized)

        preparation = timed(work)
        self.model = made[0]
        main = Path(settings["artifact"])
        size = main.stat().st_size + main.with_suffix(".bin").stat().st_size
        versions = {"nncf": nncf.__version__, "openvino": ov.__version__.split("-")[0]}
        return {"preparation": preparation, "file_bytes": size, "versions": versions}

    def run(self, **arguments: Any) -> Any:
        raise NotImplementedError("this contestant prepares, and gives outputs")

    def output(self, inputs: list[str], batch: int) -> Any:
        """float32 [samples, ...] for the samples of .npy files."""
        import openvino as ov

        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = self.threads
        compiled = ov.Core().compile_model(self.model, "CPU", config)
        arrays = [np.load(path, mmap_mode="r") for path in inputs]
        parts: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(arrays[0]), batch):
            parts.append(compiled([np.ascontiguousarray(x[start : start + batch]) for x in arrays])[0].copy())
        return np.concatenate(parts)


def create() -> NncfPreparation:
    return NncfPreparation()
