"""`bitdial latency-table`: times the layers of a model on this machine, for `bitdial quantize --low-bits auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bitdial.cli import files, options
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal


@command
def latency_table(
    *,
    model: options.Model,
    output: Annotated[Path, option("--output -o", "FILE.json", "Where the table goes.")],
    isa: options.Isa = None,
    threads: Annotated[int, option("--threads", "N", "Threads.", min=1)] = 1,
    batch: Annotated[int, option("--batch", "N", "Batch size to time at.", min=1)] = 8,
    repeats: Annotated[int, option("--repeats", "N", "Runs per kernel; the median counts.", min=1)] = 9,
    target: Annotated[str | None, option("--target", "NAME", "Name of the target in the table.")] = None,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Time every conv and linear layer of a .bitdial file with every exact kernel of the CPU engine.

    The table serves any network with layers of these shapes: `bitdial quantize --low-bits auto --latency-table FILE` picks per
    layer the widest low precision that costs no more time, and `--latency-gain` puts low channels where they buy time.
    """
    files.check_output(output, force)
    from bitdial.artifact import load_program
    from bitdial.engines.cpu.layer_timing import measure_table
    from bitdial.quantization.latency_table import layer_shape

    program = load_program(model)
    shapes = []
    for name, layer in program.layers.items():
        node = program.instruction(name).as_node()
        if layer.weight is not None and layer.weight.ndim in (2, 4) and layer.conv_groups == 1:
            shapes.append(layer_shape(node, program.types, layer.weight.shape))
    with terminal.progress() as report:
        table = measure_table(
            shapes, isa, threads, batch, repeats, target, lambda done, total, key: report("layers", done / total)
        )
    table.save(output)
    terminal.say(
        f"{len(table.layers)} layer shapes timed on {table.cpu} ({table.isa}, {threads} thread(s), batch {batch}): {output}"
    )
    rows = []
    for key, times in table.layers.items():
        best = min(times.seconds, key=lambda name: times.seconds[name])
        rows.append(
            [key, f"{times.seconds['direct'] * 1e6:.0f}", best, f"{times.seconds['direct'] / times.seconds[best]:.2f}"]
        )
    terminal.table(["layer", "8-bit us", "fastest", "speedup"], rows)
    terminal.emit({"output": str(output), "target": table.target, "layers": len(table.layers)})
