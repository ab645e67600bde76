"""What the server tells of itself: to its live page and to clients that ask for statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bitdial._version import __version__
from bitdial.serving.metrics import ModelMetrics
from bitdial.serving.page.routes import LiveState, ModelState
from bitdial.serving.protocol.response import VERSION
from bitdial.serving.server.model import ServedModel


class Live:
    """The source of the live page (see `bitdial.serving.page.routes.LiveSource`). processor: as people call it."""

    def __init__(self, models: Mapping[str, ServedModel], processor: str) -> None:
        self.models, self.processor = models, processor
        self._begun = time.monotonic()

    def live_state(self) -> LiveState:
        return {
            "server": {
                "version": __version__,
                "uptime_s": time.monotonic() - self._begun,
                "processor": self.processor,
            },
            "models": [model_state(m) for m in self.models.values()],
        }

    def live_metrics(self, model: str) -> ModelMetrics | None:
        found = self.models.get(model)
        return None if found is None else found.metrics


def model_state(model: ServedModel) -> ModelState:
    """A model as it stands, as far as it is known."""
    state: ModelState = {
        "name": model.name,
        "state": model.state,
        "slo_ms": 1000.0 * model.settings.slo,
        "policy": model.policy,
        "workers": model.pool.size,
        "message": model.reason,
    }
    if model.loaded:
        info = model.info
        state["ratios"], state["accuracy"] = list(info.ratios), list(info.accuracy)
        state["inputs"], state["outputs"] = [asdict(t) for t in info.inputs], [asdict(t) for t in info.outputs]
        state["engine"] = info.engine if model.dilation is None else {**info.engine, "dilation": model.dilation}
        state["digest"] = info.digest
        state["layers"] = [
            {
                "name": row.get("source") or row["name"],
                "kind": row["kind"],
                "macs": row["macs"],
                "eligible": row["eligible"],
                "low_share": row["low"],
            }
            for row in info.layers
        ]
        state["table"] = model.scheduler.table.table.as_json()
    return state


def statistics(model: ServedModel) -> dict[str, Any]:
    """Counts and times of a model, in the form that Triton's clients read. Times in nanoseconds, summed over requests;
    last_inference in milliseconds since 1970, 0: none yet."""
    metrics = model.metrics
    if metrics is None:
        return {"name": model.name, "version": VERSION}
    outcomes = {name: tally.count for name, tally in metrics.outcomes.items()}
    answered = outcomes["ok"] + outcomes["late"]
    refused = outcomes["shed"] + outcomes["expired"] + outcomes["failed"] + outcomes["invalid"]

    def entry(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(1e9 * seconds)}

    return {
        "name": model.name,
        "version": VERSION,
        "last_inference": round(1000.0 * metrics.last_inference),
        "inference_count": sum(tally.count for tally in metrics.samples_by_ratio.values()),
        "execution_count": sum(metrics.batch_samples.counts),
        "inference_stats": {
            "success": entry(answered, metrics.total_latency.total),
            "fail": entry(refused, 0.0),
            "queue": entry(answered, metrics.queue_latency.total),
            "compute_infer": entry(answered, metrics.compute_latency.total),
        },
        "batch_stats": [],
    }
