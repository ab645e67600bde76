"""What can go wrong while deploying."""

from __future__ import annotations

from bitdial.errors import BitdialError


class RayMissing(BitdialError):
    """Ray is not installed, or too old."""


class DeployError(BitdialError):
    """The cluster could not be reached or started, or the application did not start on it."""
