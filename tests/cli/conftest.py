"""A digits model trained for one epoch and quantized once through the command line; commands run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitdial.cli import main


@dataclass
class Result:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Bitdial = Callable[..., Result]


@pytest.fixture
def bitdial(capsys: pytest.CaptureFixture[str]) -> Bitdial:
    """bitdial("evaluate", path, ...) -> Result."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of zoo:digits after one epoch."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from bitdial.zoo.digits import train_digits

    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    train_digits(0, 1, cache_path=path)
    return path


@pytest.fixture(scope="session")
def settings(weights: Path) -> list[str]:
    """Options of a quick quantization."""
    return ["--model", "zoo:digits", "--weights", str(weights), "--data", "digits", "--images", "32", "--threads", "1"]


@pytest.fixture(scope="session")
def artifact(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with its curve, baselines and search history."""
    path = tmp_path_factory.mktemp("artifact") / "digits.bitdial"
    search = ["--target", "paper", "--population", "4", "--generations", "2", "--search-images", "16"]
    assert main(["quantize", *settings, *search, "--eval-images", "100", "--quiet", "-o", str(path)]) == 0
    return path
