"""Engines: one folder each, one interface (`bitdial.engines.base.Engine`). Adding one means adding a folder."""

from bitdial.engines.base import Engine, available_engines, create_engine

__all__ = ["Engine", "available_engines", "create_engine"]
