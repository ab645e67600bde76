"""Errors of the load test that are not about its settings or files."""

from __future__ import annotations

from flexiq.errors import FlexiqError


class ServerError(FlexiqError):
    """The server under test cannot be reached, or what it says about itself or its answers cannot be used."""
