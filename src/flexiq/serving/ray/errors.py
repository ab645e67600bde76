"""What can go wrong while deploying."""

from __future__ import annotations

from flexiq.errors import FlexiqError


class RayMissing(FlexiqError):
    """Ray is not installed, or too old."""


class DeployError(FlexiqError):
    """The cluster could not be reached or started, or the application did not start on it."""
