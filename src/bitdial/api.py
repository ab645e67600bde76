"""The pipelines behind `bitdial.quantize`, `bitdial.finetune` and `bitdial.load`. Importing this module needs no torch; calling
mostly does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdial.engines.base import Engine, create_engine, default_engine
from bitdial.errors import ConfigError, DataError, LostAnswersWarning
from bitdial.graph.structure import restore
from bitdial.quantization.answers import kept_answers
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program

if TYPE_CHECKING:
    import torch

    from bitdial.finetuning.config import FinetuneConfig
    from bitdial.finetuning.data import Augment, Batch, Batches
    from bitdial.finetuning.trainer import TrainingProgress
    from bitdial.pipeline import Prepared
    from bitdial.selection.layerwise import LayerwiseConfig

Progress = Callable[[str, float], None]


class QuantizedModel:
    """A quantized network with its dial: call it like the network it came from.

    qm(x) runs at the dial's ratio, qm(x, ratio=0.5) at another for this call only. `set_ratio` takes the table's entry
    nearest at or below what is asked for and returns it. Copies (`copy.deepcopy`, `copy.copy`) and pickles have a program, an
    engine and a dial of their own; they are made through the bytes of the .bitdial file, and read back by its checked loader.
    """

    def __init__(self, program: Program, engine: str | None = None, **options: Any) -> None:
        self.program = program
        self.engine_name = engine or default_engine(program, list(options))
        self.engine: Engine = create_engine(program, self.engine_name, **options)
        self._options = options

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: the file's bytes, how the engine was made, the dial. Raises ArtifactError."""
        from bitdial.artifact import to_bytes

        made = {"program", "engine_name", "engine", "_options"}
        own = {name: value for name, value in vars(self).items() if name not in made}  # what the user put there
        return _restored, (type(self), to_bytes(self.program), self.engine_name, self._options, self.ratio), own or None

    def __call__(self, batch: Any, ratio: float | None = None) -> Any:
        """Outputs for a batch, nested and named as the network's own: in the same tuples, lists and dicts; named tuples and
        dataclasses as `bitdial.graph.structure.NamedOutputs` and `RecordOutputs`. See `Engine.run`, which gives them flat.
        Raises InputError and RatioError."""
        return restore(self.program.structure, self.engine.run(batch, ratio))

    def set_ratio(self, ratio: float) -> float:
        """Turn the dial (0 = 8-bit, 1 = all eligible channels low). Returns the ratio now in force. Raises RatioError."""
        return self.engine.set_ratio(ratio)

    @property
    def ratio(self) -> float:
        return self.engine.ratio

    @property
    def ratios(self) -> list[float]:
        return self.engine.ratios

    def describe(self) -> dict[str, Any]:
        """Per layer: precision, groups, shifts, engine; what runs in float and why. JSON-able."""
        return self.engine.describe()

    def save(self, path: str | Path, *, band: tuple[float, float] | None = None) -> Any:
        """Write one .bitdial file (atomically). band=(low, high): keep only these ratios, and store what is low at all of
        them at the low width only. Returns a summary of sizes. Raises OutputError, ArtifactError."""
        from bitdial.artifact import save_program

        return save_program(self.program, Path(path), band=band)

    def evaluate(
        self,
        data: Iterable[Any],
        *,
        ratios: Sequence[float] | None = None,
        metric: Callable[[Any, Any], float] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[dict[str, Any]]:
        """The accuracy curve on (inputs, targets) batches: one row per ratio with accuracy, its standard error,
        agreement with the smallest ratio (the 8-bit model), soft-label distance to it, and the shares of multiplies that run low.

        metric: (outputs, targets) -> mean over the batch; default top-1 accuracy.
        """
        from bitdial.benchmarking.accuracy import evaluate_curve
        from bitdial.engines.base import ratio_index

        indices = [ratio_index(self.ratios, r) for r in (self.ratios if ratios is None else ratios)]
        base = 0  # agreement is measured against the smallest ratio, which runs first
        order = [base, *(i for i in indices if i != base)]
        total = len(data) if isinstance(data, Sized) else None
        rows = evaluate_curve(self.engine.run, [self.ratios[i] for i in order], data, metric, progress, total)
        for row, index in zip(rows, order, strict=True):
            row["low_share"] = self.program.low_share(index)
            row["eligible_share"] = self.program.eligible_share(index)
        by_index = dict(zip(order, rows, strict=True))
        return [by_index[i] for i in indices]


def _restored(
    kind: type[QuantizedModel], data: bytes, engine: str, options: dict[str, Any], ratio: float
) -> QuantizedModel:
    """A copied or unpickled model. Raises ArtifactError for bytes that are no sound file, EngineError where the engine that the
    model ran on is missing."""
    from bitdial.artifact import from_bytes

    model = kind.__new__(kind)
    QuantizedModel.__init__(model, from_bytes(data, "the copied model"), engine, **options)
    model.set_ratio(ratio)
    return model


def quantize(
    model: torch.nn.Module | str | os.PathLike[str],
    calibration: Any,
    config: QuantizeConfig | None = None,
    *,
    evaluation: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    engine: str | None = None,
) -> QuantizedModel:
    """Quantize a trained network. The caller's model is not changed.

    model: any network torch.export can capture, float32; or the path of a float ONNX model (".onnx", opset 11 on), whose inputs
    have the batch first (open, or fixed, which it then is no longer). calibration: a tensor (batch first), or any iterable or
    DataLoader of tensors, tuples (the inputs that forward() requires, then labels) or dicts (by parameter name); at most
    `config.calibration_images` samples are used. Doubtful data are warned of (UserWarning, kept in `provenance["warnings"]`).
    evaluation: (inputs, targets) batches; fills the model's accuracy curve.
    metric: see `QuantizedModel.evaluate`. engine: see `load`. checkpoint: file from which an interrupted search resumes.
    Warns (LostAnswersWarning) of ratios at which the network keeps too little of the 8-bit model's answers on the calibration
    samples (`config.keep_answers`); what each ratio keeps is in `program.provenance["answers"]`.
    Raises CaptureError, CalibrationError, ConfigError.
    """
    import torch

    from bitdial.pipeline import quantize_prepared, silent

    config = config or QuantizeConfig()
    report = progress or silent
    with torch.autocast("cpu", enabled=False):
        prepared = prepare_model(model, calibration, config, progress=report)
        program = quantize_prepared(
            prepared, config, progress=report, checkpoint=None if checkpoint is None else Path(checkpoint)
        )
    _warn_of_lost_answers(program)
    result = QuantizedModel(program, engine)
    if evaluation is not None:
        program.curve = result.evaluate(evaluation, metric=metric)
    return result


def finetune(
    model: torch.nn.Module | str | os.PathLike[str],
    data: Any,
    calibration: Any = None,
    config: QuantizeConfig | None = None,
    settings: FinetuneConfig | None = None,
    *,
    start: QuantizedModel | None = None,
    validation: Any = None,
    evaluation: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
    training: Callable[[TrainingProgress], None] | None = None,
    checkpoint: str | Path | None = None,
    stop: Callable[[], bool] | None = None,
    engine: str | None = None,
) -> QuantizedModel:
    """Quantize a trained network and train it on, so that one model is good at every ratio. The caller's model is not changed.

    model: as for `quantize`, with its original float weights. data: training data, a pair (inputs [N, ..], class indices int64
    [N]), or a DataLoader or list of batches (inputs.., targets); read once per epoch. calibration, config: as for `quantize`;
    without calibration, its samples are drawn from `data`.
    start: a model quantized from these very weights on this very `calibration`: its settings and groups are taken, nothing is
    searched again, and `config` is left out. settings: of the training (`FinetuneConfig`).
    validation: held-out data of the same forms, on which states are judged; the best is the result (`keep`).
    evaluation, metric: as for `quantize`; measured before (`provenance["finetuning"]["before"]`) and after (`curve`).
    augment: (inputs, generator) -> inputs, for a pair of tensors (`bitdial.finetuning.data.flip_and_crop`).
    progress: (stage, share done); training: called after every update. checkpoint: file from which an interrupted training
    resumes, with the same result as without the interruption; removed when the training is over. stop: asked after every update;
    True writes the checkpoint and raises `Interrupted`.

    A loss that diverges ends the training; the best state so far is the result, and `provenance["finetuning"]["stopped"]` says
    so. Raises CaptureError, CalibrationError, ConfigError, DataError (data, a start of other weights, a checkpoint of another
    run), OutputError, `bitdial.finetuning.trainer.Interrupted`.
    """
    import torch

    from bitdial.finetuning.config import FinetuneConfig
    from bitdial.finetuning.data import training_batches
    from bitdial.pipeline import quantize_prepared, silent
    from bitdial.pipeline.finetuning import checked_device, finetune_prepared
    from bitdial.pipeline.start import check_start, start_config

    settings, report = settings or FinetuneConfig(), progress or silent
    checked_device(settings)
    if start is not None and config is not None:
        raise ConfigError("start brings the settings it was quantized with: leave config out")
    if start is not None and calibration is None:
        raise ConfigError("start needs the calibration data it was quantized with: pass them as calibration")
    config = start_config(start.program, "start") if start is not None else config or QuantizeConfig()
    batches = training_batches(data, settings.batch_size, settings.seed, augment)
    if batches.steps < 1:
        raise DataError("the training data are empty: give at least one batch")
    held = validation_batches(validation, settings.batch_size)
    if calibration is None:
        calibration = _calibration_from(data, batches, config)
    path = None if checkpoint is None else Path(checkpoint)
    with torch.autocast("cpu", enabled=False):
        prepared = prepare_model(model, calibration, config, progress=report)
        if start is not None:
            check_start(start.program, prepared, config, "start")
            program = start.program
        else:
            program = quantize_prepared(prepared, config, progress=report)
        before = QuantizedModel(program, engine).evaluate(evaluation, metric=metric) if evaluation is not None else []
        done = finetune_prepared(
            prepared, program, config, settings, batches, validation=held, progress=training, stage=report,
            checkpoint=path, stop=stop,
        )  # fmt: skip
    _warn_of_lost_answers(done.program)
    result = QuantizedModel(done.program, engine)
    done.program.provenance.pop("evaluation", None)  # it was of the start
    if evaluation is not None:
        done.program.provenance["finetuning"]["before"] = before
        done.program.curve = result.evaluate(evaluation, metric=metric)
    if path is not None:
        path.unlink(missing_ok=True)
    return result


def _warn_of_lost_answers(program: Program) -> None:
    """Tell the caller of `quantize` or `finetune` which ratios are of no use."""
    kept = kept_answers(program)
    if kept is not None and (text := kept.warning()):
        warnings.warn(text, LostAnswersWarning, stacklevel=3)


def validation_batches(validation: Any, size: int) -> list[Batch]:
    """Batches (inputs, targets) of what a user gives as validation data: None, a pair of tensors, or an iterable of batches.

    Raises DataError.
    """
    from bitdial.finetuning.data import SampledBatches, split_batch, training_batches

    if validation is None:
        return []
    batches = training_batches(validation, size, 0)
    if isinstance(batches, SampledBatches):
        inputs, targets = validation
        return [([inputs[a : a + size]], targets[a : a + size]) for a in range(0, len(inputs), size)]
    return [split_batch(batch, number) for number, batch in enumerate(validation)]


def _calibration_from(data: Any, batches: Batches, config: QuantizeConfig) -> Any:
    """Calibration samples out of the training data: drawn by the seed from a pair of tensors, the first of a loader's."""
    import torch

    from bitdial.finetuning.data import SampledBatches

    if isinstance(batches, SampledBatches):
        order = torch.randperm(batches.n, generator=torch.Generator().manual_seed(config.seed))
        return batches.read(order[: config.calibration_images])[0]
    return (inputs for inputs, _ in batches.epoch(0))


def compile(
    model: torch.nn.Module | str | os.PathLike[str],
    calibration: Any,
    config: LayerwiseConfig,
    *,
    validation: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    progress: Progress | None = None,
    engine: str | None = None,
) -> QuantizedModel:
    """Compile a trained PyTorch network with one precision per layer, under budgets. The caller's model is not changed.

    Layers are ranked by local metrics of two runs over the calibration data, one before and one after quantization
    (QuantuneV2); no retraining, no search. config: a `LayerwiseConfig` with at least one budget. model, calibration, evaluation,
    metric, engine: as for `quantize`. validation: (inputs, targets) batches, read anew on every pass, for
    config.accuracy_floor. What was decided and why is in `program.provenance["layerwise"]`. Raises CaptureError,
    CalibrationError, ConfigError, and BudgetError for a budget that cannot be met.
    """
    import torch

    from bitdial.pipeline import silent
    from bitdial.pipeline.causes import causes_named
    from bitdial.pipeline.layerwise import compile_layerwise
    from bitdial.pipeline.samples import gather, plain_module

    network = plain_module(model)
    samples = gather(calibration, network, config.calibration_images)

    def accuracy(program: Program) -> float:
        assert validation is not None
        own = QuantizedModel(program)
        return float(own.evaluate(validation, ratios=[program.ratios[-1]], metric=metric)[-1]["accuracy"])

    with torch.autocast("cpu", enabled=False), causes_named(network, samples):
        compiled = compile_layerwise(
            network, samples.inputs, config, names=samples.names, accuracy=None if validation is None else accuracy,
            progress=progress or silent,
        )  # fmt: skip
    result = QuantizedModel(compiled.program, engine)
    result.set_ratio(compiled.program.ratios[-1])
    if evaluation is not None:
        compiled.program.curve = result.evaluate(evaluation, metric=metric)
    return result


def prepare_model(
    model: torch.nn.Module | str | os.PathLike[str],
    calibration: Any,
    config: QuantizeConfig,
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Capture, calibrate and lay out; several configs can then be tried with `bitdial.pipeline.quantize_prepared`."""
    from bitdial.pipeline import prepare, silent
    from bitdial.pipeline.causes import causes_named
    from bitdial.pipeline.samples import gather, plain_module

    network = plain_module(model)
    samples = gather(calibration, network, config.calibration_images)
    with causes_named(network, samples):
        return prepare(network, samples.inputs, config, names=samples.names, progress=progress or silent)


def load(path: str | Path, engine: str | None = None, **options: Any) -> QuantizedModel:
    """Load a .bitdial file.

    engine: "cpu" (compiled), "reference" (torch), or None: the compiled one where it is there and can run the model. options:
    the engine's, e.g. threads=2, memory="small" for cpu, device="cuda" for reference. Both give the same outputs, to the bit
    for convolutional networks. Raises ArtifactError for anything wrong with the file, EngineError for the engine.
    """
    from bitdial.artifact import load_program

    return QuantizedModel(load_program(Path(path)), engine, **options)
