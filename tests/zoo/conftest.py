from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with trained weights and CIFAR-10; tests that need it are skipped, loudly, where it is absent."""
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("BITDIAL_DATA", default))
    if not (folder / "weights").is_dir():
        pytest.skip(f"NO DATA: {folder} holds no weights/; set BITDIAL_DATA to the data folder to run this test")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
