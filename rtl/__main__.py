"""python -m rtl verilog -o npu.v [--rows N] [--columns N]   the unit as Verilog
python -m rtl registers                                      tables of registers, settings and words (docs/npu.md)"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from bitdial.engines.npu.plan import Design
from bitdial.errors import BitdialError
from bitdial.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rtl", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    verilog = commands.add_parser("verilog", help="write Verilog")
    verilog.add_argument("-o", "--output", type=Path, required=True)
    for size in fields(Design):
        verilog.add_argument(f"--{size.name}", type=int, default=size.default)
    commands.add_parser("registers", help="print the tables")
    given = parser.parse_args()
    if given.command == "registers":
        from rtl.tables import tables

        print(tables())
        return
    from rtl.verilog import verilog_text

    try:
        text = verilog_text(Design(**{f.name: getattr(given, f.name) for f in fields(Design)}))
        write_atomically(given.output, text.encode())
    except BitdialError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
