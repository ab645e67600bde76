"""Recording what a scheduler was told, and replaying it: every decision can be looked at again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

from bitdial.errors import ConfigError
from bitdial.serving.control.policies import make_policy
from bitdial.serving.control.queue import Request
from bitdial.serving.control.scheduler import Batch, Scheduler
from bitdial.serving.control.settings import Settings
from bitdial.serving.control.table import ServiceTable


class Recorder:
    """An observer that writes one JSON line per event; the first line holds all that is needed to replay.

    Raises nothing while serving: a full disk ends the recording, `error` says why.
    """

    def __init__(self, stream: TextIO, table: ServiceTable, settings: Settings, policy: str, workers: int) -> None:
        self.stream, self.error = stream, ""
        self._write(
            {
                "event": "begin",
                "format": "bitdial-decisions",
                "version": 1,
                "table": table.as_json(),
                "settings": settings.model_dump(),
                "policy": policy,
                "workers": workers,
            }
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self.error:
            return
        try:
            self.stream.write(json.dumps(row) + "\n")
        except (OSError, ValueError) as error:
            self.error = str(error)

    def __call__(self, event: str, now: float, **fields: Any) -> None:
        self._write({"event": event, "now": now, **fields})


def replay(lines: Iterable[str]) -> list[str]:
    """Feed a recording to a new scheduler. Returns a line for every decision that came out differently (none: all the same).

    Raises ConfigError if it is no recording, or one of another version.
    """
    rows = (json.loads(line) for line in lines if line.strip())
    try:
        first = next(rows)
        if first.get("format") != "bitdial-decisions" or first.get("version") != 1:
            raise ConfigError("this is no recording of decisions (bitdial serve --record writes one)")
        scheduler = Scheduler(
            ServiceTable.from_json(first["table"]),
            Settings(**first["settings"]),
            make_policy(first["policy"]),
            first["workers"],
        )
        differences: list[str] = []
        running: dict[int, Batch] = {}
        for row in rows:
            difference = _step(scheduler, running, row)
            if difference:
                differences.append(f"at {row['now']:.6f}: {difference}")
        return differences
    except ConfigError:
        raise
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the recording is damaged: {type(error).__name__}: {error}") from error


def _step(scheduler: Scheduler, running: dict[int, Batch], row: dict[str, Any]) -> str:
    event, now = row["event"], row["now"]
    if event == "submit":
        samples = row["samples"] if "samples" in row else row["images"]  # as older recordings have it
        request = Request(row["id"], row["arrival"], row["deadline"], row["drop_at"], samples, row["cap"])
        refusal = scheduler.submit(now, request)
        reason = None if refusal is None else refusal.reason
        return "" if reason == row["refused"] else f"request {row['id']}: refused {row['refused']}, now {reason}"
    if event == "next":
        scheduler.workers = row["workers"]
        batch = scheduler.next_batch(now)
        got = (None, [], None) if batch is None else (batch.id, [r.id for r in batch.requests], batch.index)
        if batch is not None:
            running[batch.id] = batch
        was = (row["batch"], row["ids"], row["index"])
        return "" if got == was else f"batch {was}, now {got}"
    if event == "cancel":
        scheduler.cancel(now, row["id"])
    elif event == "expire":
        scheduler.expire(now)
        scheduler.take_expired()
    elif event == "answered":
        scheduler.answered(now, row["seconds"])
    elif event in ("done", "failed"):
        lost = running.pop(row["batch"], None)
        if lost is None:
            return f"batch {row['batch']} ended and was never given out"
        if event == "done":
            scheduler.completed(now, lost, row["seconds"])
        else:
            scheduler.failed(now, lost)
    else:
        raise ConfigError(f"the recording holds an unknown event '{event}'")
    return ""
