"""The build backend that pyproject.toml names: scikit-build-core's, where a missing CMake or Ninja is no error.

scikit-build-core retries a failed configure or compile without CMake (the overrides in pyproject.toml say so), but
gives up where CMake itself is not to be found. Here that case is treated alike: the package is built without its CPU
engine, unless BITDIAL_REQUIRE_NATIVE is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.errors import NotFoundError

# prepare_metadata_for_build_* are left out on purpose, as scikit-build-core does where a retry is possible: the metadata
# then come from the wheel that was really built.
__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

build_sdist = _backend.build_sdist
get_requires_for_build_editable = _backend.get_requires_for_build_editable
get_requires_for_build_sdist = _backend.get_requires_for_build_sdist
get_requires_for_build_wheel = _backend.get_requires_for_build_wheel


def build_wheel(directory: str, config_settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    """Wheel with the CPU engine, or without where it cannot be built. Returns its file name."""
    return _build(_backend.build_wheel, directory, config_settings, metadata)


def build_editable(directory: str, config_settings: dict[str, Any] | None = None, metadata: str | None = None) -> str:
    """The same for an editable installation."""
    return _build(_backend.build_editable, directory, config_settings, metadata)


def _build(
    hook: Callable[..., str], directory: str, config_settings: dict[str, Any] | None, metadata: str | None
) -> str:
    try:
        return hook(directory, config_settings, metadata)
    except NotFoundError as error:  # CMake, or Ninja and Make
        if os.environ.get("BITDIAL_REQUIRE_NATIVE", "").lower() not in {"", "0", "n", "no", "off", "f", "false"}:
            raise
        print(f"*** {error}: building bitdial WITHOUT its CPU engine", file=sys.stderr)
        pure = {**(config_settings or {}), "wheel.cmake": "false", "wheel.py-api": ""}
        return hook(directory, pure, metadata)
