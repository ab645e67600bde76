"""`python simple_throughput.py` prints what the hot operators achieve on one thread, for every instruction set.

GB/s counts bytes read and written once, of tensors that lie in cache where the cache holds them; the least time of 40.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from simple_support import Kernels, View

from bitdial.engines.cpu import native


def measure() -> None:
    kernels = Kernels(native.extension())
    rng = np.random.default_rng(0)

    def plain(n: int, h: int, w: int, c: int) -> tuple[np.ndarray, View]:
        data = rng.integers(0, 256, (n, h, w, c), dtype=np.uint8)
        return data, View(data.ctypes.data, n, h, w, c, h * w * c, w * c, c)

    def report(name: str, op: str, rows: int, n_bytes: int, fields: dict[str, Any], macs: int = 0) -> None:
        cells = []
        for isa in kernels.isas:
            run = kernels.prepare(isa, op, **fields)
            best = float("inf")  # the least of many: other work on the machine only adds
            for _ in range(40):
                start = time.perf_counter()
                run(0, rows)
                best = min(best, time.perf_counter() - start)
            extra = f" {macs / best / 1e9:5.1f} GMAC/s" if macs else ""
            cells.append(f"{isa} {n_bytes / best / 1e9:6.1f} GB/s {best * 1e6:8.0f} us{extra}")
        print(f"{name:44s} " + " | ".join(cells))

    for n in (1, 16):
        image = rng.standard_normal((n, 3, 224, 224), dtype=np.float32)
        data, dst = plain(n, 224, 224, 3)
        planes = {"src_n": 150528, "src_y": 224, "src_x": 1, "src_c": 50176}
        fields = {"src": image, **planes, "dst": dst, "inverse": 50.0, "lo": -127.0, "hi": 127.0, "zero": 128}
        report(f"quantize planes {n}x3x224x224", "quantize", n * 224, image.nbytes + data.nbytes, fields)
        x, src = plain(n, 112, 112, 64)
        y, dst = plain(n, 56, 56, 64)
        window = {"kernel_h": 3, "kernel_w": 3, "stride_h": 2, "stride_w": 2, "pad_h": 1, "pad_w": 1}
        dilation = {"dilation_h": 1, "dilation_w": 1}
        report(
            f"max_pool 3x3/2 {n}x112x112x64",
            "max_pool",
            n * 56,
            x.nbytes + y.nbytes,
            {"src": src, "dst": dst, **window, **dilation},
        )
        window = {"kernel_h": 2, "kernel_w": 2, "stride_h": 2, "stride_w": 2, "pad_h": 0, "pad_w": 0}
        report(
            f"max_pool 2x2/2 {n}x112x112x64",
            "max_pool",
            n * 56,
            x.nbytes + y.nbytes,
            {"src": src, "dst": dst, **window, **dilation},
        )
        x, a = plain(n, 56, 56, 256)
        x2, b = plain(n, 56, 56, 256)
        y, dst = plain(n, 56, 56, 256)
        zeros = {"b_channel": 1, "zero_a": 128, "zero_b": 128, "zero_out": 0}
        limits = {"lo": 0.0, "hi": 255.0}
        report(
            f"add {n}x56x56x256",
            "add",
            n * 56,
            3 * x.nbytes,
            {"a": a, "b": b, "dst": dst, **zeros, "ra": 0.7, "rb": 0.9, **limits},
        )
        gate, b = plain(n, 1, 1, 256)
        b.pitch_y = b.pitch_x = 0
        report(
            f"mul by [N,1,1,C] {n}x56x56x256",
            "mul",
            n * 56,
            2 * x.nbytes,
            {"a": a, "b": b, "dst": dst, **zeros, "m": 0.01, **limits},
        )
        entries = np.arange(256, dtype=np.uint8)
        report(f"table {n}x56x56x256", "table", n * 56, 2 * x.nbytes, {"src": a, "dst": dst, "table": entries})
        report(
            f"rescale {n}x56x56x256",
            "rescale",
            n * 56,
            2 * x.nbytes,
            {"src": a, "dst": dst, "zero_src": 128, "zero_dst": 0, "factor": 0.7, **limits},
        )
        x, src = plain(n, 7, 7, 2048)
        y, dst = plain(n, 1, 1, 2048)
        window = {"kernel_h": 7, "kernel_w": 7, "stride_h": 1, "stride_w": 1, "pad_h": 0, "pad_w": 0}
        report(
            f"sum_pool whole {n}x7x7x2048",
            "sum_pool",
            n,
            x.nbytes,
            {"src": src, "dst": dst, **window, "zero_src": 0, "zero_dst": 0, "factor": 0.02, **limits},
        )
        out = np.empty((n, 2048), np.float32)
        report(
            f"dequantize {n}x2048",
            "dequantize",
            n,
            5 * 2048 * n,
            {
                "src": dst,
                "zero": 128,
                "scale": 0.1,
                "dst": out,
                "dst_n": 2048,
                "dst_y": 2048,
                "dst_x": 2048,
                "dst_c": 1,
            },
        )
        x, src = plain(n, 7, 7, 512)
        y = np.empty((n, 512 * 49), np.uint8)
        report(
            f"copy flatten {n}x7x7x512",
            "copy",
            n,
            2 * x.nbytes,
            {
                "src": x,
                "dst": y,
                "extent": [n, 512, 7, 7, 1, 1],
                "src_stride": [25088, 1, 3584, 512, 0, 0],
                "dst_stride": [25088, 49, 7, 1, 0, 0],
                "src_offset": 0,
                "dst_offset": 0,
                "gather": None,
                "gather_axis": -1,
            },
        )
        padded = np.zeros((n, 9, 9, 512), np.uint8)
        report(
            f"copy flatten {n}x7x7x512 with a margin",
            "copy",
            n,
            2 * x.nbytes,
            {
                "src": padded,
                "dst": y,
                "extent": [n, 512, 7, 7, 1, 1],
                "src_stride": [41472, 1, 4608, 512, 0, 0],
                "dst_stride": [25088, 49, 7, 1, 0, 0],
                "src_offset": 5120,
                "dst_offset": 0,
                "gather": None,
                "gather_axis": -1,
            },
        )
        order = rng.permutation(256).astype(np.int32)
        x, src = plain(n, 56, 56, 256)
        y, dst = plain(n, 56, 56, 256)
        report(
            f"copy gather channels {n}x56x56x256",
            "copy",
            n,
            2 * x.nbytes,
            {
                "src": x,
                "dst": y,
                "extent": [n, 3136, 256, 1, 1, 1],
                "src_stride": [802816, 256, 1, 0, 0, 0],
                "dst_stride": [802816, 256, 1, 0, 0, 0],
                "src_offset": 0,
                "dst_offset": 0,
                "gather": order,
                "gather_axis": 2,
            },
        )
        for size, channels, stride in ((56, 144, 1), (56, 144, 2), (14, 576, 1)):
            x, src = plain(n, size, size, channels)
            y, dst = plain(n, size // stride, size // stride, channels)
            weight = rng.integers(-127, 128, (9, channels)).astype(np.int8)
            window = {"kernel_h": 3, "kernel_w": 3, "stride_h": stride, "stride_w": stride, "pad_h": 1, "pad_w": 1}
            report(
                f"depthwise 3x3/{stride} {n}x{size}x{size}x{channels}",
                "depthwise",
                n * size // stride,
                x.nbytes + y.nbytes,
                {
                    "src": src,
                    "dst": dst,
                    **window,
                    **dilation,
                    "multiplicity": 1,
                    "margin_h": 0,
                    "margin_w": 0,
                    "weight": weight,
                    "bias": np.zeros(channels, np.int32),
                    "m": np.full(channels, 0.01, np.float32),
                    "zero_src": 0,
                    "zero_dst": 0,
                    **limits,
                    "residual": None,
                    "residual_view": src,
                    "zero_residual": 0,
                    "residual_factor": 0.0,
                    "dst_acc": None,
                },
                9 * y.size,
            )


if __name__ == "__main__":
    measure()
