"""The CPU engine: programs compiled to steps of a C++ extension. Needs no torch for what is compiled."""

from bitdial.engines.base import EngineSpec, lazily

SPEC = EngineSpec(
    name="cpu",
    compiled=True,
    options=frozenset({"isa", "threads", "kernels", "memory", "batch_hint", "check_finite"}),
    missing=lazily("bitdial.engines.cpu.native", "missing"),
    create=lazily("bitdial.engines.cpu.engine", "CpuEngine"),
)
