"""ONNX Runtime, float32 or int8 (QDQ), with all graph optimizations. Needs no torch."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from peers.inputs import read_inputs


class OnnxRuntimePeer:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: model (.onnx with the batch dimension "N"), inputs (see `peers.inputs`), threads."""
        import onnxruntime as ort

        batch = read_inputs(settings["inputs"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_free_dimension_override_by_name("N", len(batch[0]))
        # Threads spin within a run (the default, and the fastest), and stop when it ends.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        info: dict[str, Any] = {"onnxruntime": ort.__version__}
        with tempfile.TemporaryDirectory() as folder:
            if settings.get("proof", True):
                options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self.session = ort.InferenceSession(settings["model"], options, providers=["CPUExecutionProvider"])
            if settings.get("proof", True):
                info["operators"] = operators(Path(options.optimized_model_filepath))
        self.feed = {port.name: x for port, x in zip(self.session.get_inputs(), batch, strict=True)}
        return info

    def run(self) -> Any:
        return self.session.run(None, self.feed)

    def output(self) -> Any:
        return self.session.run(None, self.feed)[0]


def operators(path: Path) -> dict[str, int]:
    """Operators that multiply, by name, of the graph that is really run: QLinearConv means int8."""
    import onnx

    counts = Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
    return {name: n for name, n in sorted(counts.items()) if any(w in name for w in ("Conv", "Gemm", "MatMul"))}


def create() -> OnnxRuntimePeer:
    return OnnxRuntimePeer()
