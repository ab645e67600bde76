"""Engines are found by the folders that they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdial import engines
from bitdial.cli import main
from bitdial.engines.base import available_engines, create_engine, default_engine, engine_specs
from bitdial.errors import EngineError

ABACUS = '''
from bitdial.engines.base import EngineSpec
from bitdial.engines.reference.engine import ReferenceEngine

SPEC = EngineSpec(
    name="abacus", compiled=True, options=frozenset({"beads"}), missing=lambda: "",
    create=lambda program, beads=10: ReferenceEngine(program), note="of wood",
)
'''


@pytest.fixture
def abacus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "abacus").mkdir()
    (tmp_path / "abacus" / "__init__.py").write_text(ABACUS, encoding="utf-8")
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    engine_specs.cache_clear()
    yield
    engine_specs.cache_clear()


def test_an_engine_is_one_folder(abacus: None, make_layer_program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program = make_layer_program(np.random.default_rng(0), np.ones((4, 4), np.int8), (4,))
    assert available_engines()["abacus"] == "" and default_engine(program, ["beads"]) == "abacus"
    x = np.ones((1, 4), np.float32)
    mine, other = create_engine(program, "abacus", beads=5), create_engine(program, "reference")
    np.testing.assert_array_equal(np.asarray(mine.run(x)), np.asarray(other.run(x)))
    with pytest.raises(EngineError, match=r"the abacus engine has no option \['threads'\]; it takes \['beads'\]"):
        create_engine(program, "abacus", threads=2)
    with pytest.raises(EngineError, match="unknown engine 'calculator': choose one of .*'abacus'"):
        create_engine(program, "calculator")
    assert main(["doctor"]) == 0 and "engine abacus: can be used (of wood)" in capsys.readouterr().out
