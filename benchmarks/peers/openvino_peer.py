"""OpenVINO on the CPU: float32, bfloat16 (by its precision hint) or int8 (from the QDQ model). Needs no torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from peers.inputs import read_inputs

MULTIPLYING = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")


class OpenVinoPeer:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: model (.onnx or .xml), inputs (see `peers.inputs`), threads, precision (the hint: "f32", "bf16" or "" for the
        plug-in's own choice), cache (folder of compiled models, or None)."""
        import openvino as ov

        self.batch = read_inputs(settings["inputs"])
        core = ov.Core()
        model = core.read_model(settings["model"])
        model.reshape({i: list(x.shape) for i, x in enumerate(self.batch)})
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings["threads"],
            "NUM_STREAMS": 1,
        }
        if settings.get("precision"):
            config["INFERENCE_PRECISION_HINT"] = settings["precision"]
        if settings.get("cache"):
            config["CACHE_DIR"] = settings["cache"]
        self.compiled = core.compile_model(model, "CPU", config)
        self.request = self.compiled.create_infer_request()
        for i, x in enumerate(self.batch):
            self.request.set_input_tensor(i, ov.Tensor(x, shared_memory=True))
        info: dict[str, Any] = {
            "openvino": ov.__version__.split("-")[0],
            "precision_hint": str(self.compiled.get_property("INFERENCE_PRECISION_HINT")),
            "threads": int(self.compiled.get_property("INFERENCE_NUM_THREADS")),
        }
        if settings.get("proof", True):
            info["primitives"] = primitives(self.compiled)
        return info

    def run(self) -> Any:
        self.request.infer()

    def output(self) -> Any:
        self.request.infer()
        return self.request.get_output_tensor(0).data


def primitives(compiled: Any) -> dict[str, int]:
    """Nodes that multiply, of the graph that is really run, by "type precision kernel", for example
    "Convolution i8 brgconv_avx512_I8"."""
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        rt = {key: str(node.rt_info[key].astype(str)) for key in ("layerType", "runtimePrecision", "primitiveType")}
        if rt["layerType"] in MULTIPLYING:
            counts[f"{rt['layerType']} {rt['runtimePrecision']} {rt['primitiveType']}"] += 1
    return dict(sorted(counts.items()))


def create() -> OpenVinoPeer:
    return OpenVinoPeer()
