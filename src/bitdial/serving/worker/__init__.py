"""Workers: a model on its engine in a process of its own, several of them supervised, and what their batches cost.

Messages between processes are JSON and tensors lie in shared memory; nothing is pickled. The server's process imports no engine.
"""

from bitdial.serving.worker.base import Result, Worker, WorkerOptions
from bitdial.serving.worker.calibration import measure_table
from bitdial.serving.worker.errors import SignatureError, UnservableError, WorkerCrash
from bitdial.serving.worker.info import ModelInfo, TensorInfo
from bitdial.serving.worker.pool import Candidate, WorkerPool
from bitdial.serving.worker.process import ProcessWorker

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
