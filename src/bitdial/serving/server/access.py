"""Who may ask: one API key for all but health and the page's shell."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from bitdial.serving.errors import Unauthorized

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})


class Access:
    """Checks the key that a request shows. key: None admits all. open_paths: served without a key."""

    def __init__(self, key: str | None, open_paths: Iterable[str] = ()) -> None:
        self._key = None if key is None else key.encode()
        self.open_paths = OPEN_PATHS | frozenset(open_paths)

    @property
    def needs_key(self) -> bool:
        return self._key is not None

    def check(self, path: str, authorization: bytes, key: bytes) -> None:
        """authorization and key: the headers Authorization ("Bearer KEY") and X-API-Key, empty where absent. Takes the same time
        wherever a wrong key differs. Raises Unauthorized."""
        if self._key is None or path in self.open_paths:
            return
        if not key:
            scheme, _, key = authorization.partition(b" ")
            if scheme.lower() != b"bearer":
                key = b""
        if not hmac.compare_digest(key.strip(), self._key):
            raise Unauthorized(
                "this server asks for its API key: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )
