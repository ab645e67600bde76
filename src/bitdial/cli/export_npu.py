"""`bitdial export-npu`: a .bitdial file as instruction words, weight images and a schedule for the NPU in rtl/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bitdial.cli import options
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, size_name


@command
def export_npu(
    *,
    model: options.Model,
    output: Annotated[Path, option("--output -o", "DIR", "Folder of the files.")],
    rows: Annotated[int, option("--rows", "N", "Rows of the array; low passes take groups of twice as many.", min=4)] = 32,
    columns: Annotated[int, option("--columns", "N", "Columns of the array.", min=1)] = 32,
    pad_groups: Annotated[
        bool, option("--pad-groups", "", "Allow groups that leave lanes empty: exact, but not faster, or slower.")
    ] = False,
    force: options.Force = False,
    terminal: Terminal,
) -> None:
    """Write instructions.bin, weights.bin, shifts.bin and manifest.json.

    Turning the dial is one instruction word a layer. Layers that the array does not run are named; they and everything between
    layers are the host's.
    """
    from bitdial.artifact import load_program
    from bitdial.engines.npu.plan import Design
    from bitdial.export.folder import check_folder, write_files
    from bitdial.export.npu import export_npu as export

    check_folder(output, force)
    result = export(load_program(model), Design(rows, columns), pad_groups)
    files = write_files(result.files, output, force)
    terminal.say(f"{', '.join(f.name for f in files)} written to {output}")
    terminal.say(f"array      {rows} x {columns}")
    terminal.say(f"layers     {result.layers} in {result.jobs} jobs, {result.words:,} instruction words")
    terminal.say(f"weights    {size_name(result.weight_bytes)}, 8-bit and low tiles")
    terminal.say(f"a switch   {result.switch_words} words")
    if result.host:
        terminal.table(["layer on the host", "why"], [list(item) for item in result.host.items()], left=2)
    terminal.emit({
        "command": "export-npu", "output": str(output), "array": [rows, columns], "layers": result.layers,
        "jobs": result.jobs, "words": result.words, "weight_bytes": result.weight_bytes,
        "switch_words": result.switch_words, "host": result.host,
    })  # fmt: skip
