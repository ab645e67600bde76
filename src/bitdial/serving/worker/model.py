"""A model on its engine, as a worker runs it: loading, what it says of itself, and batches in which a request may be bad.

Imports no engine before a model asks for it.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial._version import __version__
from bitdial.artifact import from_bytes
from bitdial.engines.base import Engine, create_engine, default_engine, engine_spec
from bitdial.errors import EngineError, EngineLostError, InputError
from bitdial.graph.batch_axis import batch_axes
from bitdial.graph.ir import BatchDim
from bitdial.graph.structure import output_names
from bitdial.processor import processor_name
from bitdial.quantization.answers import kept_answers
from bitdial.quantization.curve import column, sample_count
from bitdial.quantization.program import Program
from bitdial.serving.worker.batching import part
from bitdial.serving.worker.errors import UnservableError
from bitdial.serving.worker.info import ModelInfo, TensorInfo

Array = npt.NDArray[Any]

WARM_UP = 1.0  # seconds that the first run of a full batch may take; where it would take longer it is left out
WARY = 64  # batches that are looked through beforehand after one with a bad request


class LoadedModel:
    """A model that has been run once at every ratio.

    data: bytes of the file; path: for messages; engine, options: as `WorkerOptions`; max_batch: samples of the largest batch.
    Raises ArtifactError, EngineError, UnservableError.
    """

    def __init__(
        self,
        data: bytes,
        path: str,
        *,
        engine: str | None = None,
        options: Mapping[str, Any] | None = None,
        max_batch: int = 32,
        name: str | None = None,
    ) -> None:
        program = from_bytes(data, path)
        inputs = _input_infos(program, path)
        self.engine, chosen = _engine(program, engine, dict(options or {}))
        self._ratios = list(program.ratios)
        self._wary = 0
        outputs = self._warm_up(program, inputs, path, max_batch)
        self.info = ModelInfo(
            name or Path(path).stem,
            inputs,
            outputs,
            tuple(float(r) for r in program.ratios),
            column(program.curve, program.ratios, "accuracy"),
            _engine_info(self.engine, chosen),
            _layer_table(program),
            hashlib.sha256(data).hexdigest(),
            column(program.curve, program.ratios, "agreement"),
            sample_count(program.curve),
            kept_answers(program),
            _modelled(self.engine, chosen),
        )

    def _warm_up(
        self, program: Program, inputs: tuple[TensorInfo, ...], path: str, max_batch: int
    ) -> tuple[TensorInfo, ...]:
        """Run all ratios once, and a full batch if that is quick; what the outputs really are."""
        outputs: tuple[TensorInfo, ...] = ()
        seconds = 0.0
        value = 1 if program.lengths else 0  # where zeros mean padding, the full length is to be warmed up

        def batch_of(samples: int) -> list[Array]:
            return [np.full(t.of(samples), value, t.dtype) for t in inputs]

        for index in range(len(self._ratios)):
            begin = time.perf_counter()
            first = self._engine_run(batch_of(1), index)
            seconds = time.perf_counter() - begin
            outputs = outputs or _output_infos(program, first, path)
        # The second run at the last ratio is without what engines make ready in the first.
        begin = time.perf_counter()
        self._engine_run(batch_of(1), len(self._ratios) - 1)
        seconds = min(seconds, time.perf_counter() - begin)
        if seconds * max_batch < WARM_UP:
            found = self._engine_run(batch_of(max_batch), 0)
            for tensor, array in zip(outputs, found, strict=True):
                if array.shape != tensor.of(max_batch):
                    raise UnservableError(
                        f"{path}: output '{tensor.name}' has shape {list(array.shape)} for {max_batch} samples, where {tensor} "
                        "was expected: its samples cannot be told apart"
                    )
        return outputs

    def _engine_run(self, inputs: Sequence[Array], index: int) -> list[Array]:
        batch = inputs[0] if len(inputs) == 1 else list(inputs)
        outputs = self.engine.run(batch, self._ratios[index])
        return [np.asarray(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def run(self, inputs: Sequence[Array], samples: Sequence[int], index: int) -> tuple[list[Array], float, list[str]]:
        """A batch of requests of so many samples each, all behind each other in `inputs` (one array per model input).

        Returns the outputs of the good requests (behind each other too; may share memory with the inputs), the seconds inside
        the engine, and per request "" or why it is bad. Raises EngineError if the engine fails on every request though their
        values are finite, and EngineLostError where it will fail on every other batch as well.

        Engines refuse a batch with a NaN, and check for it at no cost; the search for the request to blame is only made
        then, and for some batches after, so that a sender of NaN does not make everyone compute twice.
        """
        checked = [""] * len(samples)
        seconds = 0.0
        if self._wary:
            self._wary -= 1
            checked = self._not_finite(inputs, samples)
        if not any(checked):
            begin = time.perf_counter()
            try:
                outputs = self._engine_run(inputs, index)
                return outputs, time.perf_counter() - begin, checked
            except EngineLostError:
                raise
            except InputError as error:
                problem: Exception = error
            except Exception as error:  # of torch, NumPy, ...: see below
                problem = error
            seconds += time.perf_counter() - begin
            checked = self._not_finite(inputs, samples)
            if not any(checked):
                return self._one_by_one(inputs, samples, index, seconds, problem)
            self._wary = WARY
        good = [i for i, found in enumerate(checked) if not found]
        if not good:
            return [], seconds, checked
        starts = _starts(samples)
        kept = [
            np.concatenate([part(t, a, starts[i], samples[i]) for i in good], axis=t.axis)
            for t, a in zip(self.info.inputs, inputs, strict=True)
        ]
        begin = time.perf_counter()
        try:
            outputs = self._engine_run(kept, index)
        except EngineLostError:
            raise
        except Exception as error:
            more = [samples[i] for i in good]
            outputs, seconds, found = self._one_by_one(kept, more, index, seconds, error)
            for i, text in zip(good, found, strict=True):
                checked[i] = text
            return outputs, seconds, checked
        return outputs, seconds + time.perf_counter() - begin, checked

    def run_held(
        self, inputs: Sequence[Array], samples: Sequence[int], index: int, hold: float
    ) -> tuple[list[Array], float, list[str]]:
        """As `run`, but not done before `hold` seconds have passed."""
        begin = time.perf_counter()
        result = self.run(inputs, samples, index)
        rest = hold - (time.perf_counter() - begin)
        if rest > 0:
            time.sleep(rest)
        return result

    def _not_finite(self, inputs: Sequence[Array], samples: Sequence[int]) -> list[str]:
        """Per request "" or which input holds a NaN or infinity."""
        checked = [""] * len(samples)
        for tensor, array in zip(self.info.inputs, inputs, strict=True):
            if array.dtype.kind not in "fc" or np.isfinite(array).all():
                continue
            for i, (start, count) in enumerate(zip(_starts(samples), samples, strict=True)):
                if not checked[i] and not np.isfinite(part(tensor, array, start, count)).all():
                    checked[i] = f"input '{tensor.name}' holds NaN or infinite values"
        return checked

    def _one_by_one(
        self, inputs: Sequence[Array], samples: Sequence[int], index: int, seconds: float, problem: Exception
    ) -> tuple[list[Array], float, list[str]]:
        """The batch fails for a reason that is not seen in the values (an index out of an embedding's range, say): find
        the requests that fail by themselves."""
        rows: list[list[Array]] = []
        checked = []
        for start, count in zip(_starts(samples), samples, strict=True):
            own = [part(t, a, start, count) for t, a in zip(self.info.inputs, inputs, strict=True)]
            begin = time.perf_counter()
            try:
                if len(samples) == 1:
                    raise problem
                rows.append([o.copy() for o in self._engine_run(own, index)])
                checked.append("")
            except EngineLostError:
                raise
            except InputError as error:
                checked.append(str(error))
            except Exception as error:
                checked.append(f"the engine fails on it: {type(error).__name__}: {error!s:.200}")
            seconds += time.perf_counter() - begin
        if not rows:
            if isinstance(problem, InputError):
                return [], seconds, checked
            if isinstance(problem, EngineError):
                raise problem
            raise EngineError(f"the engine failed: {type(problem).__name__}: {problem!s:.500}") from problem
        outputs = [
            np.concatenate([row[i] for row in rows], axis=tensor.axis) for i, tensor in enumerate(self.info.outputs)
        ]
        return outputs, seconds, checked


def _starts(samples: Sequence[int]) -> list[int]:
    """Where each request begins in the batch, in samples."""
    starts, at = [], 0
    for count in samples:
        starts.append(at)
        at += count
    return starts


def _engine(program: Program, name: str | None, options: dict[str, Any]) -> tuple[Engine, str]:
    """The engine, and its name. What the reference engine does not take but can do in its own way is translated."""
    name = name or default_engine(program, list(options))
    if "threads" in engine_spec(name).options:
        return create_engine(program, name, **options), name
    options.pop("batch_hint", None)  # nothing is timed
    threads = options.pop("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise EngineError(f"threads must be a whole number in 1..1024, got {threads!r}")
    engine = create_engine(program, name, **options)
    torch = sys.modules.get("torch")  # engines that need it have it by now; the others do not
    if torch is not None:
        torch.set_num_threads(threads)
    return engine, name


def _input_infos(program: Program, path: str) -> tuple[TensorInfo, ...]:
    result = []
    for name in program.inputs:
        kind = program.types[name]
        dims = [d for d in kind.shape if isinstance(d, BatchDim)]
        if len(dims) != 1:
            raise UnservableError(
                f"{path}: input '{name}' is {kind}, without exactly one batch axis: requests cannot share a batch; quantize "
                "the model with the batch axis of every input left open"
            )
        shape = tuple(-1 if isinstance(d, BatchDim) else int(d) for d in kind.shape)
        result.append(TensorInfo(name, kind.dtype, shape, dims[0].factor))
    return tuple(result)


def _output_infos(program: Program, found: Sequence[Array], path: str) -> tuple[TensorInfo, ...]:
    """From the graph's shapes and what a run on one sample gave."""
    axes = batch_axes(program.graph)
    result = []
    names = output_names(program.structure, program.outputs)
    for name, shown, array in zip(program.outputs, names, found, strict=True):
        kind, axis = program.types[name], axes.get(name)
        if axis is None or axis.outer != 1:
            raise UnservableError(
                f"{path}: output '{name}' is {kind}, along which the samples of a batch do not lie one behind the other: the "
                "answers of a batch could not be told apart; give the model an output with a batch axis"
            )
        shape = tuple(-1 if i == axis.axis else int(d) for i, d in enumerate(array.shape))
        info = TensorInfo(shown, array.dtype.name, shape, axis.inner)
        if array.shape != info.of(1):
            raise UnservableError(f"{path}: output '{name}' is {kind} in the file, but comes as {list(array.shape)}")
        result.append(info)
    return tuple(result)


def _engine_info(engine: Engine, name: str) -> dict[str, Any]:
    said = engine.describe().get("engine", {})
    plain = {k: v for k, v in said.items() if isinstance(v, (str, int, float, bool)) and k not in ("cpu", "arithmetic")}
    hint = getattr(engine, "batch_hint", None)
    torch = sys.modules.get("torch")
    threads = said.get("threads") or (None if torch is None else torch.get_num_threads())
    return {
        **plain,
        "name": name,
        "processor": said.get("cpu") or processor_name(),
        **({} if threads is None else {"threads": threads}),
        "version": __version__,
        **({} if hint is None else {"batch_hint": hint}),
    }


def _modelled(engine: Any, name: str) -> tuple[float, ...]:
    """As in `ModelInfo`."""
    return tuple(engine.modelled_seconds(1, ratio) for ratio in engine.ratios) if engine_spec(name).modelled else ()


def _layer_table(program: Program) -> list[dict[str, Any]]:
    steps = {step.name: step for step in program.instructions}
    rows = []
    for name, layer in program.layers.items():
        total = int(layer.group_macs.sum()) if layer.n_groups else 0
        low = [float(layer.group_macs[row].sum()) / total if total else 0.0 for row in layer.low]
        rows.append(
            {
                "name": name,
                "source": steps[name].source,
                "kind": layer.kind,
                "macs": int(layer.macs),
                "eligible": layer.eligible,
                "reason": layer.reason,
                "low": [round(share, 4) for share in low],
            }
        )
    return rows
