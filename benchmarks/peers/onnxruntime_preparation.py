"""ONNX Runtime's static quantizer makes an int8 model with quantize/dequantize pairs, which ONNX Runtime then runs. Needs neither
torch nor bitdial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.preparation import timed


class OnnxRuntimePreparation:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: model (.onnx), samples (.npy files, one per input), transformer, artifact (.onnx to write), threads.

        Unsigned activations, signed weights per channel. Of transformers products and embeddings alone are quantized: with
        additions, LayerNorms and softmax too, as it does by default, they lose more for nothing.
        """
        import onnxruntime as ort
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.threads, self.model = settings["threads"], settings["artifact"]
        samples = [np.load(path) for path in settings["samples"]]
        names = [port.name for port in ort.InferenceSession(settings["model"], providers=["CPUExecutionProvider"]).get_inputs()]

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.items: Iterator[Any] = (
                    dict(zip(names, (x[i : i + 1] for x in samples), strict=True)) for i in range(len(samples[0]))
                )

            def get_next(self) -> Any:
                return next(self.items, None)

        def work() -> None:
            folded = str(Path(self.model).with_suffix(".folded.onnx"))
            quant_pre_process(settings["model"], folded, skip_symbolic_shape=True)  # it would need sympy
            quantize_static(
                folded, self.model, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "Gather", "Gemm", "MatMul"] if settings["transformer"] else None,
            )  # fmt: skip
            Path(folded).unlink()

        preparation = timed(work)
        size = Path(self.model).stat().st_size
        return {"preparation": preparation, "file_bytes": size, "versions": {"onnxruntime": ort.__version__}}

    def run(self, **arguments: Any) -> Any:
        raise NotImplementedError("this contestant prepares, and gives outputs")

    def output(self, inputs: list[str], batch: int) -> Any:
        """float32 [samples, ...] for the samples of .npy files."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        if self.threads:
            options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        arrays = [np.load(path, mmap_mode="r") for path in inputs]
        parts: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(arrays[0]), batch):
            feed = {name: np.ascontiguousarray(x[start : start + batch]) for name, x in zip(names, arrays, strict=True)}
            parts.append(session.run(None, feed)[0])
        return np.concatenate(parts)


def create() -> OnnxRuntimePreparation:
    return OnnxRuntimePreparation()
