"""Putting a new version of a model's file to use: its service times, and requests that wait."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from bitdial.serving.control import Scheduler, ServiceTable, Settings
from bitdial.serving.worker.calibration import cache_path, measure_table, modelled_table, read_cache
from bitdial.serving.worker.pool import Candidate, WorkerPool

MEASURING = 2.0  # seconds spent on a new version's service times while the one before serves


class Version(NamedTuple):
    """A new version whose workers are ready."""

    candidate: Candidate
    table: ServiceTable


async def prepare_version(
    pool: WorkerPool, settings: Settings, table: ServiceTable, remembered: bool = True, again: bool = False
) -> Version | None:
    """Load what is now in the model's file, beside what is in use; None: it has not changed.

    table: of the version in use. remembered: whether times that an earlier start has measured may be used. again: also where the
    file has not changed.
    Raises BitdialError, also where the settings leave the new version no ratio; then nothing of it is left running.
    """
    digest = pool.info.digest
    candidate = await pool.prepare()
    try:
        if candidate.info.digest == digest and not again:
            await candidate.discard()
            return None
        found = await _table(candidate, settings, table, remembered)
        settings.allowed(found)
    except BaseException:
        await candidate.discard()
        raise
    return Version(candidate, found)


async def _table(candidate: Candidate, settings: Settings, table: ServiceTable, remembered: bool) -> ServiceTable:
    """Service times: known ones, else those in use where the ratios are the same (serving corrects them), else measured, though
    the machine is busy. What was measured so is not remembered for other starts. Modelled times are the new version's own."""
    info, known = candidate.info, None
    if info.modelled:
        return modelled_table(info, settings.max_batch)
    if remembered:
        known = await asyncio.to_thread(lambda: read_cache(cache_path(info, settings.max_batch), info))
    found = known or table
    if found.ratios == info.ratios:
        return info.judge(found)
    return await measure_table(candidate.workers[0], settings.max_batch, seconds=MEASURING, remember=False)


def carry_over(old: Scheduler, new: Scheduler) -> None:
    """What one scheduler has learned that holds for another: the load, and how far service times are off."""
    new.rate, new.overhead, new.workers = old.rate, old.overhead, old.workers
    if old.table.table.ratios == new.table.table.ratios:
        new.table.common, new.table.own, new.table.spread = old.table.common, list(old.table.own), old.table.spread
