"""Reading files of older versions: each version has a function that turns its manifest and tensors into the next one's.

When a version comes: raise CURRENT_VERSION, register a function for the one before, and keep a file of that among the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.version1 import from_version_1
from bitdial.errors import ArtifactError, ArtifactVersionError, GraphError

CURRENT_VERSION = 2
Array = npt.NDArray[Any]
Contents = tuple[dict[str, Any], dict[str, Array]]  # manifest, tensors by name
Migration = Callable[[dict[str, Any], dict[str, Array]], Contents]
MIGRATIONS: dict[int, Migration] = {1: from_version_1}


def parse_version(text: str, where: str) -> int:
    """The version written in a file. Raises ArtifactVersionError if newer than this bitdial, else ArtifactError."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or str(int(text)) != text:
        raise ArtifactError.damaged(where, f"'{text:.20}' is no format version")
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
    """Bring the contents of a version-`version` file up to the current version, one version at a time.

    Raises ArtifactError; whatever else a malformed file trips over is the caller's to type.
    """
    for step in range(version, CURRENT_VERSION):
        if step not in MIGRATIONS:
            raise ArtifactError(
                f"{where}: no way from format version {step} to {step + 1}; use an older bitdial to convert"
            )
        try:
            manifest, tensors = MIGRATIONS[step](manifest, tensors)
        except GraphError as error:
            raise ArtifactError.damaged(where, f"{error}") from error
        if not all(isinstance(t, np.ndarray) for t in tensors.values()):
            raise ArtifactError(f"{where}: the migration from version {step} is faulty; please report it")
    return manifest, tensors
