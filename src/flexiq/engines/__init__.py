"""Engines: one folder each, one interface (`flexiq.engines.base.Engine`). Adding one means adding a folder."""

from flexiq.engines.base import Engine, available_engines, create_engine

__all__ = ["Engine", "available_engines", "create_engine"]
