"""`bitdial export-onnx`: a model at one ratio as an ONNX file, compared in ONNX Runtime before it is written."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bitdial.cli import options, reading
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, duration, percent, ratio_name, size_name
from bitdial.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from bitdial.cli.data import DataOptions
    from bitdial.export.onnx import Comparison, OnnxModel
    from bitdial.quantization.program import Program

RANDOM_SAMPLES, DATA_SAMPLES = 64, 256
BATCH = 16


@command
def export_onnx(
    *,
    model: options.Model,
    ratio: Annotated[
        str,
        option(
            "--ratio", "R",
            "Setting of the dial that the file has, e.g. 50, 50% or 0.5 (above 1: percent); the model's nearest at or "
            "below it is taken.",
        ),
    ],
    output: Annotated[Path, option("--output -o", "FILE.onnx", "The file.")],
    opset: Annotated[int, option("--opset", "N", "ONNX operator set, 18 to 24; 4-bit types need 21.")] = 21,
    low: Annotated[
        Literal["int4", "int8"] | None,
        option(
            "--low", "int4|int8",
            "How weights of low channels are stored; the results are the same. Default: int4 where the opset has it.",
        ),
    ] = None,
    check: Annotated[
        bool | None,
        option(
            "--check/--no-check", "",
            "Compare ONNX Runtime with bitdial before writing, and write nothing where they differ by more than one "
            "output step, or in 0.1 % of the top-1 answers. Default: where onnxruntime is installed.",
        ),
    ] = None,
    data: options.Data,
    images: Annotated[
        int | None,
        option(
            "--images", "N",
            f"Samples to compare on. Default: {DATA_SAMPLES} test images of --data, else {RANDOM_SAMPLES} of random "
            f"numbers.", min=1,
        ),
    ] = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Write the model at one fixed ratio as an ONNX graph of quantize/dequantize pairs with 4-bit and 8-bit weights."""
    wanted = reading.parse_share(ratio, "--ratio")
    from bitdial.artifact import load_program
    from bitdial.cli.data import DataOptions
    from bitdial.cli.files import check_output
    from bitdial.export.onnx import to_onnx
    from bitdial.files import write_atomically

    check_output(output, force)
    program = load_program(model)
    written = to_onnx(program, wanted, opset=opset, low=low, digest=_digest(model))
    if abs(written.ratio - wanted) > 1e-9:
        terminal.note(f"note: the model has no ratio {ratio_name(wanted)}; {ratio_name(written.ratio)} is written")
    given = DataOptions(**data) if "data" in data else None
    found, seconds = None, 0.0
    if _wants_check(check, terminal):
        started = time.perf_counter()
        found = _compare(written, program, given, images, seed)
        seconds = time.perf_counter() - started
        if not found.passed:
            raise ExportError(
                f"nothing was written: on {found.samples} samples ONNX Runtime {found.runtime} is up to "
                f"{found.max_steps:.3g} output steps from bitdial ({percent(found.within_step)} of them within 1), top-1 "
                f"the same for {percent(found.top1)}; the limits are {found.limits}; --no-check writes the file all "
                "the same"
            )
    write_atomically(output, written.data, "the ONNX model")
    _print(terminal, output, written, found, seconds)
    terminal.emit(_json(model, output, written, found))


def _digest(path: Path) -> str:
    from bitdial.artifact.container import read_header

    with path.open("rb") as stream:
        return read_header(stream, str(path)).metadata["manifest_sha256"]


def _wants_check(check: bool | None, terminal: Terminal) -> bool:
    if check is None and importlib.util.find_spec("onnxruntime") is None:
        terminal.note("note: not compared, since onnxruntime is not installed: pip install bitdial[onnx]")
        return False
    return check is not False


def _compare(
    written: OnnxModel, program: Program, given: DataOptions | None, images: int | None, seed: int
) -> Comparison:
    from bitdial.engines.base import defining_engine
    from bitdial.export.onnx import compare, random_batches

    engine = defining_engine(program)
    if given is None:
        batches: Iterator[list[Any]] = random_batches(program, images or RANDOM_SAMPLES, seed, BATCH)
    else:
        if len(program.inputs) != 1:
            raise ConfigError("--data needs a model of one input; leave it out to compare on random numbers")
        used, _ = given.drawn("test", images or DATA_SAMPLES, seed, program.provenance.get("source"), program)
        batches = ([pixels] for pixels, _ in used.batches(BATCH))
    return compare(written.data, program, engine, written.ratio, batches)


def _print(terminal: Terminal, output: Path, written: OnnxModel, found: Comparison | None, seconds: float) -> None:
    terminal.say(
        f"{output}: ratio {ratio_name(written.ratio)}, opset {written.opset}, {size_name(len(written.data))}; "
        f"{written.int4_weights} weights in 4 bits, {written.int8_weights} in 8"
    )
    if written.split_layers:
        terminal.say(
            f"{len(written.split_layers)} layers could sum beyond 2^24; their activations are cut into digits to stay exact"
        )
    if found is not None:
        top1 = "" if found.top1 is None else f", top-1 the same for {percent(found.top1)}"
        terminal.say(
            f"ONNX Runtime {found.runtime} on {found.samples} samples: {percent(found.identical)} of the outputs identical, "
            f"at most {found.max_steps:.3g} output steps apart{top1} ({duration(seconds)})"
        )
        if found.max_steps > 1:
            terminal.say(
                f"{percent(found.within_step)} of the samples are within one step; float operators between the layers round "
                "differently in every runtime (docs/export-onnx.md)"
            )


def _json(model: Path, output: Path, written: OnnxModel, found: Comparison | None) -> dict[str, Any]:
    return {
        "command": "export-onnx",
        "model": str(model),
        "output": str(output),
        "ratio": written.ratio,
        "opset": written.opset,
        "low": written.low,
        "bytes": len(written.data),
        "int4_weights": written.int4_weights,
        "int8_weights": written.int8_weights,
        "split_layers": written.split_layers,
        "check": None
        if found is None
        else {
            "samples": found.samples,
            "identical": found.identical,
            "max_steps": found.max_steps,
            "within_step": found.within_step,
            "max_difference": found.max_difference,
            "float_operators": found.float_operators,
            "passed": found.passed,
            "top1_agreement": found.top1,
            "onnxruntime": found.runtime,
        },
    }
