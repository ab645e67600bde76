"""`export_c`: a program as a dependency-free C99 file pair and its self-test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.engines.base import defining_engine
from bitdial.errors import ExportError
from bitdial.export.c.emit import write_sources
from bitdial.export.c.lowering import lower_program
from bitdial.export.c.names import check_name
from bitdial.export.c.planning import plan_memory
from bitdial.export.c.selftest import Floats, sample_inputs, write_test
from bitdial.export.folder import write_files
from bitdial.quantization.program import Program


@dataclass(frozen=True)
class CExport:
    """What was made.

    files: file name -> text. ratios: exported. arena, bound: bytes of the static arena, and what no placement in this order
    of operators can go below. constants: bytes of const arrays, of which `weights`. outputs: values of all outputs.
    """

    name: str
    files: dict[str, str]
    ratios: list[float]
    arena: int
    bound: int
    constants: int
    weights: int
    macs: int
    steps: int
    shared: int

    def summary(self) -> dict[str, Any]:
        """JSON-able, without the texts."""
        return {
            "name": self.name, "files": sorted(self.files), "ratios": self.ratios, "arena_bytes": self.arena,
            "arena_lower_bound": self.bound, "arena_minimal": self.arena == self.bound, "constant_bytes": self.constants,
            "weight_bytes": self.weights, "multiply_accumulates": self.macs, "steps": self.steps,
            "reused_in_place": self.shared,
        }  # fmt: skip


def export_c(
    program: Program,
    name: str = "net",
    ratios: Sequence[int] | None = None,
    sample: Sequence[Floats] | None = None,
    ram: int = 0,
) -> CExport:
    """C sources of a program.

    ratios: indices into program.ratios, ascending; None for all. One alone makes a smaller file: its low weights are stored
    at two a byte. sample: float32 [1, ...] per input for the self-test; default: random over the 8-bit range.
    ram: bytes that the arena may grow to, for speed at ratios above 0; 0: as small as it can be.
    Raises ExportError naming each operator without a C form and its module path, or a bad name; EngineError where no engine is
    there to compute the expected outputs.
    """
    check_name(name)
    chosen = list(range(len(program.ratios))) if ratios is None else list(ratios)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= len(program.ratios):
        raise ExportError(f"ratio indices {chosen} are not ascending indices of the {len(program.ratios)} ratios")
    lowered = lower_program(program, chosen)
    plan = plan_memory(lowered, ram)
    scale = program.qparams[lowered.quantized_input].scale if lowered.quantized_input is not None else 1.0
    sources = write_sources(name, lowered, plan, scale)
    inputs = list(sample) if sample is not None else sample_inputs(program)
    expected = _expected(program, chosen, inputs)
    files = {
        f"{name}.h": sources.header,
        f"{name}.c": sources.source,
        f"{name}_test.c": write_test(name, lowered, inputs, expected),
    }
    return CExport(
        name, files, list(lowered.ratios), plan.layout.size, plan.layout.bound, sources.constants, sources.weights,
        sum(s.macs for s in lowered.steps), len(lowered.steps), len(plan.layout.shared),
    )  # fmt: skip


def _expected(program: Program, ratios: Sequence[int], inputs: Sequence[Floats]) -> list[list[Floats]]:
    """Outputs of the reference engine (the compiled one, which gives the same bits, where torch is absent)."""
    engine = defining_engine(program)
    result = []
    for index in ratios:
        outputs = engine.run(inputs[0] if len(inputs) == 1 else list(inputs), program.ratios[index])
        result.append([np.asarray(o, np.float32) for o in (outputs if isinstance(outputs, tuple) else (outputs,))])
    return result


def write_folder(export: CExport, folder: Path, force: bool = False) -> list[Path]:
    """Write the files, all or none (see `write_files`). Raises OutputError."""
    return write_files({file: text.encode("ascii") for file, text in export.files.items()}, folder, force)
