"""How many connections this process may hold open: each needs a descriptor, and the system lends only so many."""

from __future__ import annotations

import contextlib
import logging
import os
import resource

from bitdial.errors import ConfigError
from bitdial.serving.server.config import ServerConfig

# While a worker starts it takes eight (sockets, shared memory, pipes), afterwards two; a new version's stand beside the old ones.
PER_WORKER, PER_MODEL = 8, 8
SPARE = 64  # for logs, recordings, the files that libraries open
FEWEST = 16  # connections that a server may be cut down to

logger = logging.getLogger("bitdial.serving")


def connection_limit(config: ServerConfig) -> int:
    """Connections to take at once. The process's soft limit of open files is raised for them as far as the hard limit goes;
    where that is too little, the number that nobody has asked for is reduced. Raises ConfigError where that does not help."""
    others = _open_now() + SPARE + sum(PER_MODEL + 2 * PER_WORKER * m.workers for m in config.models)
    wanted = config.max_connections
    available = _raise_limit(others + wanted) - others
    if available >= wanted:
        return wanted
    asked = "max_connections" in config.model_fields_set
    if asked or available < FEWEST:
        fewer = f", or --max-connections {available}" if available >= FEWEST else ""
        raise ConfigError(
            f"{wanted} connections and what runs beside them need {others + wanted} open files, and the system lets this process "
            f"have {others + available}: raise its limit (ulimit -n, or LimitNOFILE of a service){fewer}"
        )
    logger.warning(
        "the system lets this process have %d open files: %d connections are taken at once instead of %d; raise the limit "
        "(ulimit -n, or LimitNOFILE of a service)", others + available, available, wanted,
    )  # fmt: skip
    return available


def _raise_limit(wanted: int) -> int:
    """Open files that the process may have, after asking for more if they are fewer than `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited:
        return wanted
    if soft < wanted:
        more = wanted if hard == unlimited else min(wanted, hard)
        if more > soft:
            with contextlib.suppress(OSError, ValueError):  # forbidden here: what there is has to do
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == unlimited else soft


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 32
