"""NVIDIA's driver as a device."""

from __future__ import annotations


def missing() -> str:
    """ "" if there is a GPU that the engine can use, else what is missing and how to get it."""
    return "it is not finished"
