"""`bitdial quantize --smooth`: the strength reaches the configuration, and a bad one is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitdial.errors import ConfigError

COMMAND = ("quantize", "--model", "zoo:digits", "--data", "digits", "--images", "8", "--no-evaluate")


@pytest.mark.parametrize(("options", "strength"), [(("--smooth", "0.7"), 0.7), ((), 0.5), (("--smooth", "0"), 0.0)])
def test_the_strength_reaches_the_configuration(
    bitdial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], strength: float
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    seen: list[float] = []

    def stop(network: Any, calibration: Any, config: Any, **others: Any) -> None:
        seen.append(config.smooth)
        raise ConfigError("far enough for this test")

    monkeypatch.setattr("bitdial.api.quantize", stop)
    result = bitdial(*COMMAND, *options, "-o", tmp_path / "a.bitdial")
    assert result.code != 0 and "far enough" in result.err and seen == [strength]


def test_a_strength_above_one_is_refused(bitdial: Any, tmp_path: Path) -> None:
    result = bitdial(*COMMAND, "--smooth", "1.5", "-o", tmp_path / "a.bitdial")
    assert result.code == 2 and "smooth" in result.err and not list(tmp_path.iterdir())
