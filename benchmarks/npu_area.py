"""Area and frequency of the NPU's elements and arrays by Yosys and nextpnr: dual-mode, plain, fast inner product.

Gates: Yosys' estimate of transistors in generic CMOS cells, and 24 a flip-flop (no library, no wires: for comparisons
only). ECP5: LUT4s, carry cells and flip-flops without DSP blocks, and the frequency after place and route (LFE5U-85F, speed
grade 6) with registers before every input.

    python benchmarks/npu_area.py                       elements; needs pip install bitdial[npu]
    python benchmarks/npu_area.py --array               arrays with edges and feet, and the whole unit; an hour
    python benchmarks/npu_area.py --ffip-rtl CHECKOUT   the arrays of arXiv 2311.12224 from their sources (see npu_ffip.py)

Each replaces its part of the result file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from amaranth.back import verilog  # noqa: E402
from amaranth.hdl import Elaboratable, Module, Signal  # noqa: E402
from rtl.edges import Extract, Foot  # noqa: E402
from rtl.fast import FastElement, FastFoot, PairProduct  # noqa: E402
from rtl.grids import KINDS, Grid, Shifted  # noqa: E402
from rtl.sequencer import Sequencer  # noqa: E402
from rtl.variants import PlainElement  # noqa: E402
from rtl.verilog import unit  # noqa: E402

import npu_ffip  # noqa: E402
from bitdial.engines.npu.plan import Design  # noqa: E402
from bitdial.files import write_atomically  # noqa: E402
from common import print_table, run_command  # noqa: E402
from npu_synthesis import ecp5, gates, require_yosys  # noqa: E402

SUM_BITS = 22  # of 32 rows
PARTS: dict[str, tuple[Any, float, float]] = {  # what, 8-bit and 4-bit products a cycle
    "plain 8-bit": (lambda: PlainElement(SUM_BITS), 1, 1),
    "dual": (lambda: PlainElement(SUM_BITS, low=True), 1, 2),
    "dual, shifter in it": (lambda: PlainElement(SUM_BITS, low=True, shift=True), 1, 2),
    "dual, and 2 bits": (lambda: PlainElement(SUM_BITS, low=True, two=True), 1, 2),
    "fast inner product": (lambda: FastElement(SUM_BITS), 2, 2),
    "column's shifter": (lambda: Foot(SUM_BITS), 0, 0),
    "extract": (Extract, 0, 0),
    "fast: a row's pair": (lambda: PairProduct(SUM_BITS), 0, 0),
    "fast: a column's foot": (lambda: FastFoot(SUM_BITS), 0, 0),
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


def part_area(make: Callable[[], Any], route: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, part := make(), part.ports())
        found = {**gates(folder, READ, "part"), **ecp5(folder, READ, "part", False)}
        if route:
            timed = Registered(make())
            write(folder, timed, [*timed.pins, *timed.outputs])
            found["megahertz"] = ecp5(folder, READ, "part", True).get("megahertz")
        return found


READ = "read_verilog part.v"


def write(folder: str, part: Any, ports: list[Signal]) -> None:
    Path(folder, "part.v").write_text(verilog.convert(part, name="part", ports=ports))


def grid_area(kind: str, n: int) -> dict[str, Any]:
    """Of n * n 8-bit products a cycle."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder, grid := Grid(kind, n, n), grid.ports())
        return {**gates(folder, READ, "part"), **ecp5(folder, READ, "part", False)}


def grid_frequency(kind: str, n: int) -> float | None:
    with tempfile.TemporaryDirectory() as folder:
        timed = Shifted(grid := Grid(kind, n, n), grid.sums_o)
        write(folder, timed, [timed.bit, timed.parity])
        return ecp5(folder, READ, "part", True).get("megahertz")


def unit_area(n: int, route: bool) -> dict[str, Any]:
    """The whole unit with its default memories as block RAM, on an ECP5 alone."""
    with tempfile.TemporaryDirectory() as folder:
        npu = unit(Design(n, n))
        write(folder, npu, npu.ports())
        return ecp5(folder, READ, "part", route)


class Stored:
    """The result file: each measurement is written when it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.content |= {"yosys": require_yosys(), "sum_bits": SUM_BITS}

    def put(self, section: str, name: str, found: dict[str, Any]) -> None:
        self.content.setdefault(section, {})[name] = found
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def elements(stored: Stored, route: bool) -> None:
    for name, (make, high, _) in PARTS.items():
        stored.put("parts", name, part_area(make, route and bool(high)))


def show_elements(stored: Stored) -> None:
    """And the elements, edges and feet of 32 x 32 products, from the parts."""
    found = stored.content["parts"]
    base = found["plain 8-bit"]["transistors"]
    rows = []
    for name, (_, high, low) in PARTS.items():
        part = found[name]
        each = [f"{part['transistors'] / n / base:.2f}" if n else "" for n in (high, low)]
        rows.append([name, f"{part['transistors']:,}", f"{part['transistors'] / base:.2f}", *each, *cells(part)])
    columns = ["part", "transistors", "of plain", "per 8-bit product", "per 4-bit product", "LUT4", "CCU2C", "FF", "MHz"]
    size = {name: part["transistors"] for name, part in found.items()}
    n = 32
    dual = {"elements": size["dual"] * n * n, "shifters": size["column's shifter"] * n, "extraction": size["extract"] * 2 * n}
    fast = {
        "elements": size["fast inner product"] * n * n // 2, "pairs": size["fast: a row's pair"] * n // 2,
        "feet": size["fast: a column's foot"] * n,
    }  # fmt: skip
    stored.put("estimates", f"{n} x {n}", {"dual": dual, "fast inner product": fast, "plain 8-bit": base * n * n})
    told = "; ".join(
        f"{n} x {n} {name}, {sum(own.values()) / (base * n * n):.2f} of plain: "
        + ", ".join(f"{part} {100 * own[part] / sum(own.values()):.1f} %" for part in own)
        for name, own in (("dual", dual), ("fast", fast))
    )
    print_table("NPU elements", columns, rows, f"{stored.content['yosys']}, sums of {SUM_BITS} bits; {told}")


def arrays(stored: Stored, sizes: list[int], route: bool) -> None:
    """Areas first, then the frequencies, which take longer. Shares: of the feet and the extraction, measured alone, in the dual
    array."""
    for n in sizes:
        bits = 17 + (n - 1).bit_length()
        edges = {"column's shifter": (lambda bits=bits: Foot(bits), n), "extraction": (Extract, 2 * n)}
        for kind in KINDS:
            stored.put("arrays", f"{kind}, {n} x {n}", grid_area(kind, n))
        whole = stored.content["arrays"][f"dual, {n} x {n}"]
        shares = {}
        for name, (make, count) in edges.items():
            alone = part_area(make, False)
            shares[name] = {
                "transistors": count * alone["transistors"] / whole["transistors"],
                "LUT4": count * alone["ecp5"]["LUT4"] / whole["ecp5"]["LUT4"],
            }
        stored.put("arrays", f"shares, {n} x {n}", shares)
        stored.put("arrays", f"unit, {n} x {n}", unit_area(n, False))
        stored.put("arrays", f"sequencer, {n} x {n}", part_area(lambda n=n: sequencer(n), False))
    for n in sizes if route else []:
        for kind in ("dual", "plain 8-bit", "fast inner product"):
            name = f"{kind}, {n} x {n}"
            stored.put("arrays", name, {**stored.content["arrays"][name], "megahertz": grid_frequency(kind, n)})
        stored.put("arrays", f"unit, {n} x {n}", unit_area(n, True))


def sequencer(n: int) -> Sequencer:
    made = Sequencer(n, 2 * n + 3)
    made.ports = lambda: [  # type: ignore[attr-defined]
        made.start, made.length, made.word, made.counter, made.busy, made.finished, made.truncated, made.illegal, made.empty,
        made.feed.as_value(), made.load.as_value(),
    ]  # fmt: skip
    return made


def show_arrays(stored: Stored, section: str, title: str, base: str) -> None:
    found = stored.content[section]
    rows = []
    for name, part in found.items():
        if name.startswith("shares"):
            continue
        own = found.get(f"{base}, {name.split(', ')[1]}", {}).get("transistors")
        size = part.get("transistors")
        compared = name.split(", ")[0] not in ("unit", "sequencer")
        rows.append([name, f"{size:,}" if size else "", f"{size / own:.2f}" if size and own and compared else "", *cells(part)])
    told = "; ".join(
        f"{part}s, {name[8:]}: {100 * share['transistors']:.1f} % ({100 * share['LUT4']:.1f} % of LUT4)"
        for name, both in found.items() if name.startswith("shares") for part, share in both.items()
    )  # fmt: skip
    columns = ["array", "transistors", f"of {base}", "LUT4", "CCU2C", "FF", "MHz"]
    print_table(title, columns, rows, f"{stored.content['yosys']}. {told}")


def cells(part: dict[str, Any]) -> list[str]:
    """What the tables show of an ECP5."""
    shown = [str(part["ecp5"][name]) for name in ("LUT4", "CCU2C", "TRELLIS_FF")]
    return [*shown, f"{part['megahertz']:.0f}" if part.get("megahertz") else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "npu_area.json")
    parser.add_argument("--no-route", action="store_true", help="no place and route")
    parser.add_argument("--array", action="store_true", help="arrays and the unit instead of elements")
    parser.add_argument("--ffip-rtl", type=Path, help="checkout of algebraic-nnhw: its arrays instead of elements")
    parser.add_argument("--sizes", default="8", help="of arrays, comma-separated (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of stored results and stop")
    given = parser.parse_args()
    sizes = [int(n) for n in given.sizes.split(",")]
    stored, route = Stored(given.output), not given.no_route
    if given.array and not given.table:
        arrays(stored, sizes, route)
    if given.ffip_rtl and not given.table:
        for n in sizes:
            for method in npu_ffip.METHODS:
                stored.put("ffip", f"{method}, {n} x {n}", npu_ffip.measure(given.ffip_rtl, method, n, route))
    if not (given.array or given.ffip_rtl or given.table):
        elements(stored, route)
    if "parts" in stored.content:
        show_elements(stored)
    if "arrays" in stored.content:
        show_arrays(stored, "arrays", "NPU arrays", "plain 8-bit")
    if "ffip" in stored.content:
        show_arrays(stored, "ffip", "Arrays of Pogue and Nicolici", "baseline")


if __name__ == "__main__":
    run_command(main)
