"""Other libraries on the same GPU, for gpu_check.py: each is left out with the reason where it does not run. None is needed.

A peer is prepared for a network and a batch, and then runs it, inputs and outputs on the device, until the device is done.
Weights are random: they do not influence speed. What torchao quantizes are linear layers; ONNX Runtime runs the QDQ model that
its own quantizer wrote when networks were prepared.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

LEAST_SECONDS = 45.0  # left of the budget, for a peer to be begun: compiling takes most of them
Run = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """cache: folder of prepared files. device: "cuda"; "cpu" in tests."""

    network: str
    inputs: Sequence[npt.NDArray[Any]]
    cache: Path
    device: str = "cuda"

    @property
    def batch(self) -> int:
        return len(self.inputs[0])


def missing(*packages: str) -> str:
    """ "" if all are installed, else which is not."""
    return next((f"{p} is not installed" for p in packages if importlib.util.find_spec(p) is None), "")


def torch_missing(*packages: str) -> str:
    problem = missing("torch", *packages)
    if not problem and not importlib.import_module("torch").cuda.is_available():
        problem = "this build of torch sees no GPU"
    return problem


def provider_missing(provider: str) -> str:
    problem = missing("onnxruntime")
    if not problem and provider not in importlib.import_module("onnxruntime").get_available_providers():
        problem = f"this build of ONNX Runtime has no {provider}"
    return problem


def torch_bfloat16(task: Task) -> Run:
    return _compiled(task, _float_network(task))


def torchao_int8(task: Task) -> Run:
    quantization = importlib.import_module("torchao.quantization")
    model = _float_network(task)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return _compiled(task, model)


def _float_network(task: Task) -> Any:
    torch = importlib.import_module("torch")
    from peers.networks import float_network

    return float_network(task.network, None).to(task.device, torch.bfloat16, memory_format=torch.channels_last)


def _compiled(task: Task, model: Any) -> Run:
    torch = importlib.import_module("torch")
    model = torch.compile(model, mode="reduce-overhead", dynamic=False)  # with CUDA graphs
    given = [torch.from_numpy(x).to(task.device) for x in task.inputs]
    given = [x.bfloat16() if x.is_floating_point() else x for x in given]
    given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]

    def run() -> Any:
        with torch.inference_mode():
            y = model(*given)
        if task.device == "cuda":
            torch.cuda.synchronize()
        return y

    return run


def onnxruntime_int8(provider: str) -> Callable[[Task], Run]:
    """Through a provider of ONNX Runtime; what it does not take runs on the next one."""

    def prepare(task: Task) -> Run:
        ort = importlib.import_module("onnxruntime")
        model = int8_model(task.network, task.cache)
        if not model.exists():
            raise FileNotFoundError(f"{model.name} was not prepared (--prepare)")
        options = ort.SessionOptions()
        options.add_free_dimension_override_by_name("N", task.batch)
        settings = {"trt_int8_enable": "1"} if provider.startswith("Tensorrt") else {}
        known = set(ort.get_available_providers()) - {provider}
        rest = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
        session = ort.InferenceSession(str(model), options, providers=[(provider, settings), *rest])
        if provider not in session.get_providers():
            raise RuntimeError(f"{provider} did not load")
        binding = session.io_binding()
        for port, x in zip(session.get_inputs(), task.inputs, strict=True):
            binding.bind_ortvalue_input(port.name, ort.OrtValue.ortvalue_from_numpy(x, task.device, 0))
        for output in session.get_outputs():
            binding.bind_output(output.name, task.device)

        def run() -> Any:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding

        return run

    return prepare


def int8_model(network: str, cache: Path) -> Path:
    return cache / f"gpu_check.{network}.int8.onnx"


# name -> (what is missing for it, prepare)
PEERS: dict[str, tuple[Callable[[], str], Callable[[Task], Run]]] = {
    "torch bfloat16, compiled": (torch_missing, torch_bfloat16),
    "torchao int8, compiled": (lambda: torch_missing("torchao"), torchao_int8),
    **{
        f"ONNX Runtime int8, {name}": (lambda p=f"{name}ExecutionProvider": provider_missing(p),
                                       onnxruntime_int8(f"{name}ExecutionProvider"))
        for name in ("CUDA", "Tensorrt")
    },
}  # fmt: skip


def milliseconds(run: Run, repeats: int = 15) -> float:
    """Median of runs behind three that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def compare(tasks: Sequence[Task], seconds_left: Callable[[], float]) -> list[dict[str, Any]]:
    """Per peer and task {"peer", "network", "batch", "ms"} or, in the place of ms, {"skipped": why}."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for name, (lacks, prepare) in PEERS.items():
            row: dict[str, Any] = {"peer": name, "network": task.network, "batch": task.batch}
            problem = lacks()
            if not problem and seconds_left() < LEAST_SECONDS:
                problem = "out of time"
            if not problem:
                try:
                    row["ms"] = milliseconds(prepare(task))
                except Exception as error:  # another library's; the check goes on without it
                    problem = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            rows.append(row | ({"skipped": problem} if problem else {}))
    return rows


def prepare_int8(network: str, cache: Path, data: Path | None) -> None:
    """The QDQ model of ONNX Runtime's quantizer. Raises what that raises; ImportError without it."""
    target = int8_model(network, cache)
    if target.exists():
        return
    from peers.models import ModelFiles

    made = ModelFiles(cache, data, lambda stage, share: None).onnx_int8(network)
    target.write_bytes(made.read_bytes())
