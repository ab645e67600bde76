"""The compiled extension is there, is the one that belongs to this tree, and is the sanitized one where that is asked for."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

import bitdial


def native() -> ModuleType:
    """The extension; skips where the package was built without a compiler, unless BITDIAL_REQUIRE_NATIVE is set."""
    try:
        return importlib.import_module("bitdial.engines.cpu._native")
    except ModuleNotFoundError:
        required = os.environ.get("BITDIAL_REQUIRE_NATIVE", "").lower() in {"1", "true", "on", "yes", "y", "t"}
        if required or "BITDIAL_SANITIZED_NATIVE" in os.environ:
            raise
        pytest.skip("CPU ENGINE NOT COMPILED: install a C++ compiler and bitdial again to run this test")


@pytest.mark.sanitize
def test_the_extension_is_of_this_version() -> None:
    """A mismatch means a stale build: the extension was compiled from other sources than these."""
    assert native().version() == bitdial.__version__


@pytest.mark.sanitize
def test_the_sanitized_extension_is_used_where_asked_for() -> None:
    wanted = os.environ.get("BITDIAL_SANITIZED_NATIVE")
    loaded = native().__file__
    assert loaded is not None
    code = Path(loaded).read_bytes()
    if wanted is None:
        assert b"__asan_init" not in code, f"{loaded} is a build with sanitizers"
    else:
        assert os.path.samefile(loaded, wanted)
        assert b"__asan_init" in code and b"__ubsan_handle" in code, f"{loaded} has no sanitizers"


def test_every_instruction_set_lists_the_same_kernels_each_of_its_own() -> None:
    module = native()
    lists = {isa: module.kernels(isa) for isa in module.supported_isas()}
    names = [[(folder, name) for folder, name, *_ in of_set] for of_set in lists.values()]
    assert all(own == names[0] for own in names)
    assert {"elementwise", "pool", "copy", "depthwise", "floats", "attention", "conv", "training"} == {f for f, _ in names[0]}
    assert ("conv", "conv") in names[0] and len(names[0]) == len(set(names[0]))
    products = [at for of_set in lists.values() for folder, _, at, _ in of_set if folder in ("attention", "conv")]
    assert len(set(products)) == len(products)  # none of another set
    others = {isa: {at for folder, _, at, _ in of_set if folder not in ("attention", "conv")} for isa, of_set in lists.items()}
    for isa, own in others.items():  # either all their own, or all of one other set
        assert all(own == theirs or not own & theirs for theirs in others.values()), isa
    if "avx2" in lists:
        assert [isa for isa in lists if others[isa] == others["avx2"]] == [i for i in lists if i in ("avxvnni", "avx512", "avx2")]
    with pytest.raises(ValueError, match="'sse9' is not supported here"):
        module.kernels("sse9")
