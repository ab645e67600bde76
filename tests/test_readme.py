"""The README's examples run, and the commands it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitdial.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitdial.quantization.config import QuantizeConfig

    monkeypatch.chdir(tmp_path)
    # the examples are run as they stand, with a small network, few images and a short search
    for name, value in {"population": 4, "generations": 1, "survivors": 2, "search_images": 8}.items():
        monkeypatch.setitem(QuantizeConfig.__pydantic_fields__, name, QuantizeConfig.model_fields[name])
        QuantizeConfig.model_fields[name].default = value
    QuantizeConfig.model_rebuild(force=True)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.add_module("stem", torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU()))
        for name in ("layer1", "layer2"):
            model.add_module(name, torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU()))
        model.add_module("head", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 36, 4)))
        images = torch.randn(8, 3, 8, 8)
        names = {
            "model": model,
            "calibration": images,
            "images": images,
            "test_batches": [(images, torch.zeros(8, dtype=torch.int64))],
        }
        assert PYTHON
        for block in PYTHON:
            exec(compile(block, "README.md", "exec"), names)
        assert (tmp_path / "model.bitdial").exists()
        assert names["logits"].shape == (8, 4)  # type: ignore[union-attr]
    finally:
        for name, value in {"population": 50, "generations": 50, "survivors": 15, "search_images": 256}.items():
            QuantizeConfig.model_fields[name].default = value
        QuantizeConfig.model_rebuild(force=True)


def test_commands_exist() -> None:
    names = {shlex.split(line)[1] for line in SHELL if line.startswith("bitdial ")}
    assert {"quantize", "evaluate", "inspect", "compare", "report", "doctor"} <= names
    for name in sorted(names):
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0 and "Usage" in shown.output
    for script in ("demo", "test"):
        assert (ROOT / script).exists() and f"./{script}" in README
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_named_in_documents_exist(document: str) -> None:
    """A path in backquotes stands for itself, or for its end below a folder that the same paragraph or the map is about."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 55  # a page
    folders = [ROOT / name for name in ("src", "csrc", "benchmarks", "scripts", "docs")]
    files = [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*")]
    for name in re.findall(r"`([\w./]+(?:\.(?:py|h|cpp|md|sh|toml)|/))`", text):
        assert (ROOT / name).exists() or any(f"/{file}/".endswith(f"/{name.rstrip('/')}/") for file in files), name
