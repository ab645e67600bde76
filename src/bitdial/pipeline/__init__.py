"""The pipelines that join the parts: quantizing a network; finetuning it; compiling it layer by layer."""

from bitdial.pipeline.preparing import Prepared, Progress, lay_out, prepare, silent
from bitdial.pipeline.quantizing import (
    CALIBRATION_MEMORY,
    Chosen,
    LowTables,
    apply_choice,
    choose,
    eight_bit_program,
    low_tables,
    quantize_prepared,
    restore_means,
    search_context,
)

__all__ = [
    "CALIBRATION_MEMORY",
    "Chosen",
    "LowTables",
    "Prepared",
    "Progress",
    "apply_choice",
    "choose",
    "eight_bit_program",
    "lay_out",
    "low_tables",
    "prepare",
    "quantize_prepared",
    "restore_means",
    "search_context",
    "silent",
]
