"""A worker's process: `python -m bitdial.serving.worker.child SOCKET MEMORY FILE PARENT` (descriptors, and the parent's id).

Messages (see `frames`): first {"path", "loading": as `LoadedModel` takes it} comes, and {"info": ModelInfo} goes, or
{"error": [class, message]} and the process ends. Then, for every {"samples": [per request], "index", "hold": seconds that it
takes at least, if any}, with the inputs in shared memory, {"compute": seconds, "checked": [per request] if any is bad} goes,
with the outputs of the good requests in shared memory, or {"error": ...}. The process ends when the socket closes, or when the
engine says that it can do nothing more here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from bitdial.errors import BitdialError, EngineLostError
from bitdial.serving.worker.errors import error_to_json
from bitdial.serving.worker.faults import Fault
from bitdial.serving.worker.file import read_descriptor
from bitdial.serving.worker.frames import BlockingFrames, Message
from bitdial.serving.worker.memory import BatchMemory
from bitdial.serving.worker.model import LoadedModel
from bitdial.serving.worker.scheduling import ENGINE_SLICE, set_slice

# The server decides when workers end: Ctrl-C and a service manager's SIGTERM reach all processes of the group at once, and
# batches have to be finished after that. Blocked from before the process begins (see `process`), ignored from here on.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even in the middle of a batch."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Serve batches until the socket closes."""
    descriptor, memory, file, parent = (int(a) for a in arguments)
    die_with_parent(parent)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    with contextlib.suppress(OSError):  # should memory run out, a worker can be replaced and the server cannot
        Path("/proc/self/oom_score_adj").write_text("500")
    set_slice(ENGINE_SLICE)  # not the server's short ones, which it may have inherited
    fault = Fault()
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        frames = BlockingFrames(sock)
        ready = _load(frames, memory, file, fault)
        if ready is not None:
            _serve(frames, *ready, fault)
            fault.at_end()


def _load(frames: BlockingFrames, memory: int, file: int, fault: Fault) -> tuple[LoadedModel, BatchMemory] | None:
    wanted = frames.receive()
    if wanted is None:
        return None
    fault.at_load()
    try:
        data = read_descriptor(file, wanted["path"])
        os.close(file)
        model = LoadedModel(data, wanted["path"], **wanted["loading"])
        del data
        shared = BatchMemory(memory, model.info, wanted["loading"]["max_batch"], grow=True)
        os.close(memory)
    except Exception as error:
        frames.send(_report(error))
        return None
    gc.collect()
    gc.freeze()  # what the model is made of stays: not to be looked through again
    frames.send({"info": model.info.as_json()})
    return model, shared


def _serve(frames: BlockingFrames, model: LoadedModel, memory: BatchMemory, fault: Fault) -> None:
    while (message := frames.receive()) is not None:
        fault.at_batch()
        try:
            samples: list[int] = message["samples"]
            outputs, compute, checked = model.run_held(
                memory.inputs(sum(samples)), samples, message["index"], message.get("hold", 0.0)
            )
            answer: Message = {"compute": compute}
            if any(checked):
                answer["checked"] = checked
                samples = [n for n, problem in zip(samples, checked, strict=True) if not problem]
            if samples:
                for target, array in zip(memory.outputs(sum(samples)), outputs, strict=True):
                    if target.shape != array.shape:
                        raise ValueError(f"an output has shape {array.shape}, {target.shape} was expected")
                    target[...] = array
        except EngineLostError as error:  # the server starts another process
            frames.send(_report(error))
            print(error, file=sys.stderr)
            return
        except Exception as error:
            answer = _report(error)
        frames.send(answer)


def _report(error: Exception) -> Message:
    if not isinstance(error, BitdialError):
        traceback.print_exc()
    return {"error": error_to_json(error)}


if __name__ == "__main__":
    main(sys.argv[1:])
