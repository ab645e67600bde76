"""Widths per layer from the settings to the file, and from there into engines and exports."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial.artifact import load_program, save_program
from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.errors import EngineError
from bitdial.pipeline.start import start_config
from bitdial.quantization.program import Program
from bitdial.quantization.targets import MECHANISMS_OF

sys.path.insert(0, str(Path(__file__).parent / "engines" / "cpu"))
nets: Any = importlib.import_module("cpu_networks")

needs_extension = pytest.mark.skipif(bool(native.missing()), reason="the CPU engine is not compiled")
CONFIG = nets.QUICK.updated(group_size=16, ratios=(0.0, 0.5, 1.0), low_weights="derived", bias_correction=False)
# Kernel that runs a mechanism, where its name is another.
KERNEL = {"winograd_narrow": "winograd"}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {t: nets.quantized(nets.wide_net(), CONFIG.updated(target=t)) for t in ("avx512vnni", "avx2", "paper")}


def limits(program: Program) -> dict[str, tuple[int, int]]:
    return {n: (v.amax, v.wmax) for n, v in program.layers.items() if v.eligible}


def test_layers_have_their_widths_and_the_file_tells_them(programs: dict[str, Program], tmp_path: Path) -> None:
    assert set(limits(programs["paper"]).values()) == {(15, 7), (7, 7)} and "widths" not in programs["paper"].provenance
    assert set(limits(programs["avx512vnni"]).values()) == {(63, 14), (31, 7), (63, 63), (127, 63)}
    assert set(limits(programs["avx2"]).values()) == {(15, 7), (63, 63)}
    for target, program in programs.items():
        assert program.provenance["target"] == {"name": target, "resolved": target}
        widths = program.provenance.get("widths", {})
        if target != "paper":
            assert {n: (w["amax"], w["wmax"]) for n, w in widths.items()} == limits(program)
        for name, layer in program.layers.items():
            if not layer.eligible:  # what never runs low has no width of its own
                assert layer.wmax == 7 and name not in widths
        save_program(program, path := tmp_path / f"{target}.bitdial")
        again = load_program(path)
        assert limits(again) == limits(program)
        for key in ("target", "widths"):
            assert again.provenance.get(key) == program.provenance.get(key)
        assert again.provenance["config"]["target"] == target and again.provenance["config"]["low_bits"] == "auto"
        assert start_config(again).target == target


def test_a_file_that_does_not_tell_of_lifting_was_made_without(programs: dict[str, Program]) -> None:
    program = programs["paper"]
    assert start_config(program).lift
    provenance = {**program.provenance, "config": {k: v for k, v in program.provenance["config"].items() if k != "lift"}}
    assert not start_config(dataclasses.replace(program, provenance=provenance)).lift


def test_a_number_goes_before_the_target() -> None:
    program = nets.quantized(nets.plain_net(), CONFIG.updated(target="avx2", low_bits=5))
    assert set(limits(program).values()) <= {(31, 15), (15, 15)}
    assert not {"widths", "target"} & set(program.provenance)


@needs_extension
@pytest.mark.parametrize("target", ["avx512vnni", "avx2"])
def test_the_engine_offers_what_widths_were_chosen_for(programs: dict[str, Program], target: str) -> None:
    """Also for low weights that reach their limit everywhere, and with the reference engine's outputs."""
    if target not in native.isas():
        pytest.skip(f"{target} does not run here")
    program = nets.with_low_plane(programs[target])
    for layer in program.layers.values():
        if layer.low_weight is not None:
            layer.low_weight = np.full_like(layer.low_weight, layer.wmax)
            layer.low_weight[1::2] *= -1
            layer.activation_shift[:] = 0  # four times the sums of Winograd stay within 32 bits
            layer.weight_shift[:] = 0
    engine = CpuEngine(program, isa=target, kernels="fixed")
    names = list(native.extension().METHODS)
    mechanisms = set()
    for name, width in program.provenance["widths"].items():
        kernel = KERNEL.get(width["mechanism"], width["mechanism"])
        assert engine.native.methods(name)[names.index(kernel)] == "", (name, width)
        mechanisms.add(width["mechanism"])
    assert mechanisms >= ({"winograd_fip", "winograd", "fip"} if target == "avx512vnni" else {"winograd_narrow", "narrow"})
    x = nets.samples(nets.wide_net(), 3)
    for ratio, expected in zip(program.ratios, nets.reference_outputs(program, x), strict=True):
        for got, want in zip(nets.outputs_of(engine.run(x, ratio)), expected, strict=True):
            assert nets.same_bits(got, want)


def test_this_machine_is_one_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.target() in MECHANISMS_OF
    program = nets.quantized(nets.plain_net(), CONFIG.updated(target="cpu"))
    assert program.provenance["target"] == {"name": "cpu", "resolved": native.target()}
    monkeypatch.setattr(native, "_extension", None)
    assert native.target() == "portable"


@needs_extension
@pytest.mark.parametrize(
    "isa, vendor, family, expected",
    [
        ("avx512vnni", "AuthenticAMD", "25", "avx512vnni"),
        ("avx512vnni", "AuthenticAMD", "26", "avx512vnni-fullrate"),
        ("avx512vnni", "GenuineIntel", "6", "avx512vnni-fullrate"),
        ("avx512vnni", "", "", "avx512vnni"),
        ("avxvnni", "GenuineIntel", "6", "avxvnni"),
        ("avx512", "GenuineIntel", "6", "avx512"),
        ("avx2", "GenuineIntel", "6", "avx2"),
        ("portable", "AuthenticAMD", "26", "portable"),
    ],
)
def test_what_processors_are_called(
    isa: str, vendor: str, family: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "isas", lambda: ["avx512vnni", "avxvnni", "avx512", "avx2", "portable"])
    monkeypatch.setattr(native, "processor_field", {"vendor_id": vendor, "cpu family": family}.__getitem__)
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    assert native.target() == expected
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(EngineError, match="sse9"):
        native.target()
