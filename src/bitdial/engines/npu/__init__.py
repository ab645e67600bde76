"""The NPU as an engine: results of the arithmetic at hand, time of the cycle model. The hardware is in rtl/, and not
needed."""

from __future__ import annotations

from bitdial.engines.base import EngineSpec, available_engines, lazily


def _missing() -> str:
    others = {name: lacking for name, lacking in available_engines(modelled=False).items() if name in ("cpu", "reference")}
    return "" if "" in others.values() else f"no engine for its arithmetic can run: {'; '.join(others.values())}"


SPEC = EngineSpec(
    name="npu",
    compiled=False,
    options=frozenset({
        "rows", "columns", "pad_groups", "megahertz", "dram_bytes_per_cycle", "energy", "threads", "check_finite",
    }),
    missing=_missing,
    create=lazily("bitdial.engines.npu.engine", "NpuEngine"),
    by_name=True, modelled=True,
)
