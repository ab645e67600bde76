"""Errors of the load test that are not about its settings or files."""

from __future__ import annotations

from bitdial.errors import BitdialError


class ServerError(BitdialError):
    """The server under test cannot be reached, or what it says about itself or its answers cannot be used."""
