"""Writing files whole, and what messages say when that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from bitdial.errors import OutputError
from bitdial.files import write_atomically


@pytest.mark.parametrize(
    ("code", "told", "not_told"),
    [
        (errno.ENOSPC, "free some space", "choose a folder"),
        (errno.EDQUOT, "free some space", "choose a folder"),
        (errno.EROFS, "on another one", "choose a folder"),
        (errno.EFBIG, "ulimit -f", "choose a folder"),
        (errno.EMFILE, "ulimit -n", "choose a folder"),
        (errno.EACCES, "that you may write to", "free"),
        (errno.ENOENT, "create the folder first", "free"),
    ],
)
def test_the_remedy_fits_the_fault(code: int, told: str, not_told: str, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    file = tmp_path / "model.bitdial"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as caught:
        write_atomically(file, b"new")
    message = str(caught.value)
    assert str(file) in message and told in message and not_told not in message
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.bitdial"]
