"""What a server tells of itself: Prometheus metrics, and a history by the second for its live page.

`ModelMetrics` needs nothing beyond the standard library; `flexiq.serving.metrics.exposition` needs prometheus_client.
"""

from flexiq.serving.metrics.history import History, Recent
from flexiq.serving.metrics.model import ModelMetrics

__all__ = ["History", "ModelMetrics", "Recent"]
