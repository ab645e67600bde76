"""The whole operation of single layers on the CPU engine: every exact kernel, group size, shift granularity, mixed prefixes.

    python benchmarks/cpu_kernels.py                         # typical layers, one thread, batch 1 and 8
    python benchmarks/cpu_kernels.py --isa avx2 --batches 8
    python benchmarks/cpu_kernels.py --repeats 31 --markdown

One process, kernels interleaved, three runs each per round of which the last two count; medians. Weights and inputs lie in
the caches as far as they fit: inside a network they are colder. Ratios are to the 8-bit direct kernel of the same layer.
GMAC/s count the layer's multiply-accumulates, so that fast algorithms may exceed the measured peak, which is printed with
the processor.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bitdial.engines.cpu import native
from bitdial.engines.cpu.layer_timing import SingleLayer
from bitdial.files import write_atomically
from bitdial.quantization.latency_table import LayerShape
from machine import describe_machine


def conv(i: int, o: int, k: int, s: int, size: int) -> LayerShape:
    """A square convolution with the padding that keeps (or halves) the size."""
    out = (size + 2 * (k // 2) - k) // s + 1
    return LayerShape(
        op="conv", in_channels=i, out_channels=o, in_size=(size, size), out_size=(out, out), kernel=(k, k), stride=(s, s),
        padding=(k // 2, k // 2), dilation=(1, 1),
    )  # fmt: skip


LAYERS = [
    conv(64, 64, 3, 1, 56), conv(128, 128, 3, 1, 28), conv(256, 256, 3, 1, 14), conv(512, 512, 3, 1, 7),
    conv(128, 256, 3, 2, 28), conv(256, 64, 1, 1, 56), conv(64, 256, 1, 1, 56), conv(1024, 256, 1, 1, 14),
    conv(256, 1024, 1, 1, 14), LayerShape(op="linear", in_channels=4096, out_channels=4096, in_size=(1,), out_size=(1,)),
]  # fmt: skip


def short(shape: LayerShape) -> str:
    """A layer's name in the table."""
    if shape.op == "linear":
        return f"linear {shape.in_channels}->{shape.out_channels}"
    return f"{shape.kernel[0]}x{shape.kernel[1]}/{shape.stride[0]} {shape.in_channels}->{shape.out_channels} @{shape.in_size[0]}"


def cases(shape: LayerShape, isa: str, batch: int, threads: int) -> dict[str, tuple[SingleLayer, int]]:
    """Name -> (layer set to a kernel, ratio index): all low with every kernel, variants of the shifts, and prefixes."""
    result: dict[str, tuple[SingleLayer, int]] = {}

    def add(name: str, method: str, index: int, **options: Any) -> None:
        layer = SingleLayer(shape, isa, threads, (0.0, 0.25, 0.5, 0.75, 1.0), **options)
        if method != "direct" and layer.unsupported(method):
            return
        layer.prepare(batch)
        layer.choose(index, method)
        result[name] = (layer, index)

    add("8-bit direct", "direct", 0)
    add("low read back", "direct", 4)
    narrow = native.extension().facts(isa)["narrow_is_faster"]
    plain = "direct"
    for method in ("narrow", "winograd") if narrow else ("fip", "winograd", "winograd_fip"):
        add(method, method, 4)
        plain = method if method in result else plain
    add(f"{plain}, no shifts between groups", plain, 4, shift_steps=1)
    add(f"{plain}, G = 32", plain, 4, group=32)
    add("shifts per output (read back)", "direct", 4, granularity="output")
    for index, share in ((1, 25), (2, 50), (3, 75)):
        add(f"{plain}, {share} % low", plain, index)
    return result


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="instruction set (default: the best here)")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    isa = native.choose_isa(options.isa)
    machine = describe_machine()
    peak = native.peak(isa, options.threads)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(
        f"{native.cpu_name()} ({machine['kind']}), {isa}, {options.threads} thread(s), peak {peak['gmacs_per_s']:.0f} GMAC/s, "
        f"memory {peak['bandwidth_gb_per_s']:.1f} GB/s; median of {options.repeats}"
    )
    rows: list[dict[str, Any]] = []
    for batch in (int(b) for b in options.batches.split(",")):
        for shape in LAYERS:
            found = cases(shape, isa, batch, options.threads)
            times: dict[str, list[float]] = {name: [] for name in found}
            for layer, index in found.values():
                layer.seconds(index, 2)
            for _ in range(options.repeats):
                for name, (layer, index) in found.items():
                    times[name] += layer.seconds(index, 3)[1:]  # the first one finds another kernel's data in the caches
            medians = {name: float(np.median(t)) for name, t in times.items()}
            rows.append(
                {
                    "layer": short(shape), "batch": batch, "macs": shape.macs * batch, "seconds": medians,
                    "speedup": {n: medians["8-bit direct"] / t for n, t in medians.items()},
                }
            )  # fmt: skip
            table = Table("kernel", "us", "GMAC/s", "of peak", "over 8-bit", title=f"{short(shape)}, batch {batch}")
            for name, seconds in medians.items():
                speed = shape.macs * batch / seconds / 1e9
                table.add_row(
                    name, f"{seconds * 1e6:.0f}", f"{speed:.0f}", f"{speed / peak['gmacs_per_s']:.0%}",
                    f"{medians['8-bit direct'] / seconds:.2f}",
                )  # fmt: skip
            console.print(table)
    if options.markdown:
        names = list(dict.fromkeys(n for row in rows for n in row["seconds"]))
        print("| layer | batch | 8-bit GMAC/s |", " | ".join(names[1:]), "|")
        print("|---" * (len(names) + 2) + "|")
        for row in rows:
            speed = row["macs"] / row["seconds"]["8-bit direct"] / 1e9
            print(f"| {row['layer']} | {row['batch']} | {speed:.0f} |", end=" ")
            print(" | ".join(f"{row['speedup'][n]:.2f}" if n in row["speedup"] else "" for n in names[1:]), "|")
    output = options.output or Path(__file__).parent / "results" / f"cpu_kernels.{machine['kind']}.{isa}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "cpu": native.cpu_name(), "isa": isa, "threads": options.threads, "peak": peak,
                "repeats": options.repeats, "rows": rows}  # fmt: skip
    write_atomically(output, (json.dumps(document, indent=1) + "\n").encode())
    console.print(f"written: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
