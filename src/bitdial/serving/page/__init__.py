"""The live page that a server shows at `/`, and a Grafana dashboard of its metrics.

The page is static files that a browser reads from this server alone; `bitdial.serving.page.routes` serves them.
"""

from __future__ import annotations

from importlib import resources


def file_bytes(name: str) -> bytes:
    """Content of one of this package's files, such as "index.html" or "grafana.json"."""
    return (resources.files(__name__) / name).read_bytes()


__all__ = ["file_bytes"]
