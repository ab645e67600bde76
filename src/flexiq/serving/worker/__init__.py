"""Workers: a model on its engine in a process of its own, several of them supervised, and what their batches cost.

Messages between processes are JSON and tensors lie in shared memory; nothing is pickled. The server's process imports no engine.
"""

from flexiq.serving.worker.base import Result, Worker, WorkerOptions
from flexiq.serving.worker.calibration import measure_table
from flexiq.serving.worker.errors import SignatureError, UnservableError, WorkerCrash
from flexiq.serving.worker.info import ModelInfo, TensorInfo
from flexiq.serving.worker.pool import Candidate, WorkerPool
from flexiq.serving.worker.process import ProcessWorker

__all__ = [
    "Candidate",
    "ModelInfo",
    "ProcessWorker",
    "Result",
    "SignatureError",
    "TensorInfo",
    "UnservableError",
    "Worker",
    "WorkerCrash",
    "WorkerOptions",
    "WorkerPool",
    "measure_table",
]
