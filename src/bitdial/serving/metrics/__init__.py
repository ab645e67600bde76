"""What a server tells of itself: Prometheus metrics, and a history by the second for its live page.

`ModelMetrics` needs nothing beyond the standard library; `bitdial.serving.metrics.exposition` needs prometheus_client.
"""

from bitdial.serving.metrics.history import History, Recent
from bitdial.serving.metrics.model import ModelMetrics

__all__ = ["History", "ModelMetrics", "Recent"]
