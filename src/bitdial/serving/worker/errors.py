"""Errors of workers, and the table by which an error crosses from a worker's process to the server's: by name, never pickled."""

from __future__ import annotations

from bitdial import errors
from bitdial.errors import BitdialError, EngineError


class WorkerCrash(BitdialError):
    """A worker died or hung, and the batch it had is lost. `status`: the HTTP status of an answer that tells of it."""

    status = 500


class UnservableError(BitdialError):
    """A sound model that cannot be served: an input or output without a batch axis, so that requests cannot share a batch."""

    status = 500


class SignatureError(BitdialError):
    """A new version of a model takes or gives other tensors than the one that is served."""

    status = 409


_TABLE: dict[str, type[BitdialError]] = {
    **{k: v for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, BitdialError)},
    **{kind.__name__: kind for kind in (WorkerCrash, UnservableError, SignatureError)},
}


def error_to_json(error: BaseException) -> list[str]:
    """[class name, message]; what is not an error of bitdial becomes an EngineError that names it."""
    for kind in type(error).__mro__:
        if _TABLE.get(kind.__name__) is kind:
            return [kind.__name__, str(error)]
    return [EngineError.__name__, f"the engine failed: {type(error).__name__}: {error!s:.500}"]


def error_from_json(value: object) -> BitdialError:
    """The error that `error_to_json` wrote; an EngineError for a name that is not in the table."""
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)):
        return EngineError(f"the worker reported an error in an unknown form: {value!r:.200}")
    name, message = value
    return _TABLE.get(name, EngineError)(message)
