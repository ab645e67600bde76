"""What a request can fail with. Each class carries the HTTP status of its answer; messages go to the caller as they are."""

from __future__ import annotations

import math

from bitdial.errors import BitdialError


class ServingError(BitdialError):
    """Base class: a request that is answered with an error.

    retry_after: seconds after which it is worth trying again; None: no such time is known. closes: the connection ends with
    the answer.
    """

    status = 500

    def __init__(self, message: str, retry_after: float | None = None, closes: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.closes = retry_after, closes

    def retry_header(self) -> int | None:
        """`retry_after` in whole seconds, at least 1, as the HTTP header has it."""
        if self.retry_after is None:
            return None
        return max(1, math.ceil(min(self.retry_after, 3600.0)))


class BadRequest(ServingError, ValueError):
    """The request is malformed, or its tensors do not fit the model."""

    status = 400


class Unauthorized(ServingError):
    """The API key is missing or wrong."""

    status = 401


class NotFound(ServingError):
    """There is no such model, version or page."""

    status = 404


class WrongMethod(ServingError):
    """The address knows other methods: those in `allow`."""

    status = 405

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class TooLarge(ServingError):
    """The request's body is larger than the server takes."""

    status = 413


class UnsupportedEncoding(ServingError):
    """The request's body is compressed in a way that the server does not know."""

    status = 415


class Gone(ServingError):
    """The client has closed its connection: nobody is there to be answered."""

    status = 499


class ComputeFailed(ServingError):
    """The batch was lost with its worker, or the engine refused it."""

    status = 500


class LoadFailed(ServingError):
    """A model file could not be loaded again; the version before stays in use."""

    status = 500


class Overloaded(ServingError):
    """The queue is full, or even the lowest precision could not answer in time."""

    status = 503


class NotReady(ServingError):
    """The model is still loading, has no running worker, or the server is about to stop."""

    status = 503


class Expired(ServingError):
    """The request's deadline passed while it waited; it was never computed."""

    status = 504
