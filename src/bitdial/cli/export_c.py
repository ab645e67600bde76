"""`bitdial export-c`: a .bitdial file as a dependency-free C99 file pair for embedded targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from bitdial.cli import options, reading
from bitdial.cli.configs import command
from bitdial.cli.options import option
from bitdial.cli.terminal import Terminal, ratio_name, size_name


@command
def export_c(
    *,
    model: options.Model,
    output: Annotated[Path, option("--output -o", "DIR", "Folder of the C files.")],
    ratio: Annotated[
        str | None,
        option(
            "--ratio", "R",
            "One fixed ratio: smaller, with low weights stored at two a byte. The entry at or below R is taken.",
        ),
    ] = None,
    ratios: Annotated[
        str, option("--ratios", "LIST", "'all', or some of them: 0,50,100. All but one share the weights.")
    ] = "all",
    name: Annotated[str, option("--name", "NAME", "Prefix of files and functions.")] = "net",
    ram: Annotated[
        int,
        option(
            "--ram", "BYTES",
            "Let the arena grow to this size where that makes ratios above 0 faster. Default: as small as it can be.",
            show_default=False, min=0,
        ),
    ] = 0,
    force: options.Force = False,
    terminal: Terminal,
) -> None:  # fmt: skip
    """Write NAME.h, NAME.c and the self-test NAME_test.c.

    The C code allocates nothing, needs no library and gives the reference engine's results bit for bit at every ratio;
    NAME_set_ratio turns the dial. It covers 8-bit convolutional networks; operators that it lacks are named in the error.
    """
    from bitdial.artifact import load_program
    from bitdial.engines.base import ratio_index
    from bitdial.errors import ConfigError
    from bitdial.export.c import export_c as export
    from bitdial.export.c import write_folder
    from bitdial.export.c.names import check_name
    from bitdial.export.folder import check_folder

    check_name(name)
    if ratio is not None and ratios != "all":
        raise ConfigError("--ratio and --ratios exclude each other: give one of them")
    check_folder(output, force)
    program = load_program(model)
    chosen: list[int] | None = None
    if ratio is not None:
        chosen = [ratio_index(program.ratios, reading.parse_share(ratio, "--ratio"))]
    elif ratios != "all":
        chosen = sorted({ratio_index(program.ratios, r) for r in reading.parse_ratios(ratios)})
    result = export(program, name, chosen, ram=ram)
    files = write_folder(result, output, force)
    if result.arena == result.bound:
        verdict = "minimal for this order of operators"
    else:
        verdict = f"the lower bound for this order of operators is {result.bound:,} bytes"
    terminal.say(f"{', '.join(f.name for f in files)} written to {output}")
    terminal.say(f"ratios     {', '.join(ratio_name(r) for r in result.ratios)}")
    terminal.say(f"arena      {result.arena:,} bytes, {verdict}")
    terminal.say(f"constants  {result.constants:,} bytes, weights {size_name(result.weights)} of them")
    terminal.say(f"run        {result.macs:,} multiply-accumulates in {result.steps} steps")
    terminal.note(
        f"test it with: cc -std=c99 -O2 {output / name}.c {output / name}_test.c -o {name}_test && ./{name}_test"
    )
    terminal.emit({"output": str(output), **result.summary()})
