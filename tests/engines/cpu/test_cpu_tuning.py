"""Choosing kernels: timed once per machine and model, remembered in a file, never at the price of a wrong answer."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_networks import (
    NETWORKS,
    QUICK,
    Floats,
    Network,
    check_engine,
    quantized,
    reference_outputs,
    samples,
    with_low_plane,
)

from bitdial.engines.cpu import native, tuning
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.quantization.program import Program

Quantized = tuple[Program, Floats, list[list[Floats]]]
METHODS = ["direct", "fip", "winograd", "winograd_fip", "narrow"]


@pytest.fixture(scope="module")
def plain() -> Quantized:
    program = quantized(NETWORKS["plain"](), QUICK.updated(bias_correction=False))
    x = samples(program.graph, 3)
    return program, x, reference_outputs(program, x)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def choices(engine: CpuEngine) -> dict[str, list[tuple[int, int]]]:
    return {n: [engine.native.choice(n, i) for i in range(len(engine.ratios))] for n in engine.compiled_layers()}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def test_timed_once_and_remembered(plain: Quantized, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x, expected = plain
    first = CpuEngine(program)
    assert first.choice_source == "timing" and first.describe()["engine"]["kernel_choice"] == "timing"
    (path,) = files(cache)
    assert path == tuning.cache_path(first) and path.suffix == ".json" and cache in path.parents
    written = path.stat().st_mtime_ns, path.read_bytes()
    monkeypatch.setattr(tuning, "time_kernels", lambda *a, **k: pytest.fail("timed a second time"))
    second = CpuEngine(program)
    assert second.choice_source == "cache" and choices(second) == choices(first)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written and files(cache) == [path]
    for engine in (first, second):
        check_engine(engine, expected, x, (1, 3))


def test_timing_leaves_no_counts(plain: Quantized, cache: Path) -> None:
    engine = CpuEngine(plain[0])
    assert engine.choice_source == "timing" and engine.counters() == []


def test_what_speed_depends_on_has_choices_of_its_own(plain: Quantized, cache: Path) -> None:
    program = plain[0]
    paths = set()
    b = Network(16, 6, 6, seed=1)  # without Winograd, which small memory leaves out
    x = b.conv(b.conv("x", 16, 1), 16, 1)
    pointwise = quantized(b.done(b.linear(b.flatten(x), 4, activation=None)), QUICK)
    for options in ({}, {"threads": 2}, {"batch_hint": 4}, {"isa": native.isas()[-1]}):
        engine = CpuEngine(program, kernels="fixed", **options)  # type: ignore[arg-type]
        paths.add(tuning.cache_path(engine))
    for own in (pointwise, with_low_plane(pointwise)):  # stored low weights are made ready in another way than derived ones
        for memory in ("fast", "small"):
            paths.add(tuning.cache_path(CpuEngine(own, kernels="fixed", memory=memory)))
    other = quantized(NETWORKS["plain"](), QUICK.updated(bias_correction=False, group_size=16))
    paths.add(tuning.cache_path(CpuEngine(other, kernels="fixed")))
    assert len(paths) == 9
    assert tuning.cache_path(CpuEngine(program, kernels="fixed")) in paths


def damaged(path: Path, engine: CpuEngine) -> dict[str, str | bytes]:
    """Contents that must be ignored: cut off, no JSON, of another form, for other layers, out of range, not exact."""
    good = json.loads(path.read_text())
    layer = next(iter(good["choices"]))
    eligible = next(n for n in engine.compiled_layers() if engine.program.layers[n].low.any())

    def changed(**rows: Any) -> str:
        return json.dumps({**good, "choices": {**good["choices"], **rows}})

    n = len(engine.ratios)
    return {
        "empty": "",
        "cut": path.read_text()[:40],
        "bytes": b"\xff\xfe\x00\x80",
        "list": "[1, 2]",
        "number": "3",
        "no choices": "{}",
        "choices are a list": json.dumps({"choices": [1]}),
        "missing layer": json.dumps({"choices": {k: v for k, v in good["choices"].items() if k != layer}}),
        "another layer": changed(conv_999=good["choices"][layer]),
        "unknown kernel": changed(**{layer: [["magic", 48]] * n}),
        "too few ratios": changed(**{layer: good["choices"][layer][:-1]}),
        "negative chunk": changed(**{layer: [["direct", -12]] * n}),
        "huge chunk": changed(**{layer: [["direct", 10**9]] * n}),
        "chunk is text": changed(**{layer: [["direct", "many"]] * n}),
        "infinite chunk": changed(**{layer: [["direct", float("inf")]] * n}),
        "not exact": changed(**{eligible: [["winograd", 48]] * n, layer: [["winograd", 48]] * n}),
        "deep": "[" * 100_000,
    }


def test_damaged_files_are_ignored(cache: Path) -> None:
    """Whatever lies in the file, the engine loads and gives the right outputs; it measures again and mends the file."""
    b = Network(3, 6, 6, seed=1)
    program = quantized(
        b.done(b.head(b.conv(b.conv(b.conv("x", 16), 16, 1), 16))), QUICK.updated(bias_correction=False)
    )
    x = samples(program.graph, 2)
    expected = reference_outputs(program, x)
    engine = CpuEngine(program)
    path = tuning.cache_path(engine)
    for what, content in damaged(path, engine).items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        again = CpuEngine(program)
        assert again.choice_source == "timing", what
        check_engine(again, expected, x, (1,))
        assert CpuEngine(program).choice_source == "cache", what
    path.unlink()
    path.mkdir()  # a folder where the file should be
    check_engine(CpuEngine(program), expected, x, (1,))
    assert [p for p in path.parent.iterdir() if p != path] == []  # no temporary file is left


def test_a_tampered_choice_that_is_exact_is_only_slower(plain: Quantized, cache: Path) -> None:
    program, x, expected = plain
    path = tuning.cache_path(CpuEngine(program))
    data = json.loads(path.read_text())
    data["choices"] = {n: [["direct", 12]] * len(program.ratios) for n in data["choices"]}
    path.write_text(json.dumps(data))
    engine = CpuEngine(program)
    assert engine.choice_source == "cache"
    assert all(c == (0, 12) for row in choices(engine).values() for c in row)
    check_engine(engine, expected, x, (1, 3))


def test_folders_that_cannot_be_written_are_harmless(
    plain: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x, expected = plain
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(blocked))
    engine = CpuEngine(program)
    assert engine.choice_source == "timing" and blocked.read_text() == "not a folder"
    check_engine(engine, expected, x, (1,))
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(locked))
    try:
        for _ in range(2):
            engine = CpuEngine(program)
            # the superuser writes everywhere
            assert engine.choice_source in (("timing", "cache") if os.geteuid() == 0 else ("timing",))
            check_engine(engine, expected, x, (1,))
    finally:
        locked.chmod(stat.S_IRWXU)


def test_a_full_disk_is_harmless(plain: Quantized, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way leaves neither a broken file nor a temporary one."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert CpuEngine(plain[0]).choice_source == "timing"
    assert files(cache) == []


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDIAL_CACHE_DIR", str(tmp_path / "own"))
    assert tuning.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BITDIAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_folder() == tmp_path / "xdg" / "bitdial"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_folder() == tmp_path / "home" / ".cache" / "bitdial"


def test_fixed_choices_are_the_same_every_time(plain: Quantized, cache: Path) -> None:
    """By rule, without timing and without a file."""
    program = plain[0]
    engines = [CpuEngine(program, kernels="fixed") for _ in range(2)]
    assert choices(engines[0]) == choices(engines[1])
    assert {e.choice_source for e in engines} == {"rule"} and files(cache) == []
    # the batch that kernels would be timed at plays no part
    assert choices(CpuEngine(program, kernels="fixed", batch_hint=16)) == choices(engines[0])


@pytest.mark.parametrize("kernels", METHODS)
def test_a_forced_kernel_runs_wherever_it_is_exact(plain: Quantized, cache: Path, kernels: str) -> None:
    program = plain[0]
    for isa in native.isas():
        engine = CpuEngine(program, isa=isa, kernels=kernels)
        assert engine.choice_source == "forced" and files(cache) == []
        usual = choices(CpuEngine(program, isa=isa, kernels="fixed"))
        for name, row in choices(engine).items():
            exact = engine.native.methods(name)[METHODS.index(kernels)] == ""
            for index, (method, chunk) in enumerate(row):
                assert chunk > 0 and chunk % 12 == 0
                if not program.layers[name].low[index].any():
                    assert METHODS[method] == "direct"
                elif exact:
                    assert METHODS[method] == kernels
                else:
                    assert (method, chunk) == usual[name][index]


def test_timed_choices_are_exact_and_packed(plain: Quantized, cache: Path) -> None:
    """Timing leaves the weights of the chosen kernels in memory, not those that it tried."""
    program = plain[0]
    engine = CpuEngine(program, threads=2, batch_hint=3)
    for name, row in choices(engine).items():
        held = dict(zip(["8-bit", "read back", *METHODS[1:], "stored low"], engine.native.weight_bytes(name), strict=True))
        used = {METHODS[m] for m, _ in row}
        for method in METHODS[1:]:
            assert (held[method] > 0) == (method in used)
        assert all(engine.native.methods(name)[m] == "" for m, _ in row)
        low = program.layers[name].low
        for i, (method, _) in enumerate(row):
            for j in range(i):  # equal low groups, equal choice
                if (low[i] == low[j]).all():
                    assert row[i] == row[j], (name, i, j, method)


def test_candidates_start_with_the_rules_choice(plain: Quantized) -> None:
    engine = CpuEngine(plain[0], kernels="fixed")
    unsealed = engine.native  # choosing does not pack; candidates put the choice back
    for name in engine.compiled_layers():
        for index in range(len(engine.ratios)):
            before = unsealed.choice(name, index)
            rows = tuning.candidates(engine, name, index)
            assert rows[0] == tuple(unsealed.usual(name, index)) and len(set(rows)) == len(rows)
            assert unsealed.choice(name, index) == before
            exact = {m for m, why in enumerate(unsealed.methods(name)) if not why}
            low = bool(engine.program.layers[name].low[index].any())
            assert {m for m, _ in rows} == (exact if low else {0})
            assert np.all([chunk > 0 for _, chunk in rows])
