"""Reading files of older versions: each version has a function that turns its manifest and tensors into the next one's.

Version 1 is the first, so that the registry is empty. When a version 2 comes: raise CURRENT_VERSION, register a
function for 1, and keep a file of version 1 among the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ArtifactError, ArtifactVersionError

CURRENT_VERSION = 1
Array = npt.NDArray[Any]
Contents = tuple[dict[str, Any], dict[str, Array]]  # manifest, tensors by name
Migration = Callable[[dict[str, Any], dict[str, Array]], Contents]
MIGRATIONS: dict[int, Migration] = {}


def parse_version(text: str, where: str) -> int:
    """The version written in a file. Raises ArtifactVersionError if newer than this bitdial, else ArtifactError."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or str(int(text)) != text:
        raise ArtifactError(f"{where}: '{text:.20}' is no format version; get a sound copy of the file")
    version = int(text)
    if version > CURRENT_VERSION:
        raise ArtifactVersionError(
            f"{where}: format version {version}, this bitdial reads up to {CURRENT_VERSION}; install a newer bitdial "
            "(`pip install -U bitdial`), or save the model again with this one"
        )
    if version < CURRENT_VERSION and version not in MIGRATIONS:
        raise ArtifactError(
            f"{where}: format version {version} cannot be read any more; load it with an older bitdial and save it again"
        )
    return version


def migrate(version: int, manifest: dict[str, Any], tensors: dict[str, Array], where: str) -> Contents:
    """Bring the contents of a version-`version` file up to the current version, one version at a time."""
    for step in range(version, CURRENT_VERSION):
        if step not in MIGRATIONS:
            raise ArtifactError(
                f"{where}: no way from format version {step} to {step + 1}; use an older bitdial to convert"
            )
        manifest, tensors = MIGRATIONS[step](manifest, tensors)
        if not all(isinstance(t, np.ndarray) for t in tensors.values()):
            raise ArtifactError(f"{where}: the migration from version {step} is faulty; please report it")
    return manifest, tensors
