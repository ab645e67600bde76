"""The pipelines that join the parts: quantizing a network; finetuning it; compiling it layer by layer."""

from flexiq.pipeline.quantizing import (
    CALIBRATION_MEMORY,
    Chosen,
    LowTables,
    Prepared,
    Progress,
    apply_choice,
    choose,
    eight_bit_program,
    lay_out,
    low_tables,
    prepare,
    quantize_prepared,
    restore_means,
    search_context,
    silent,
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
