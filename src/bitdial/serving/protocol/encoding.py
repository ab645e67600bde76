"""Compressed request bodies, and how much they may grow to."""

from __future__ import annotations

import zlib

from bitdial.serving.errors import BadRequest, TooLarge, UnsupportedEncoding

# window bits of zlib by Content-Encoding; HTTP's "deflate" is the zlib format
_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def decode_body(body: bytes, encoding: str, limit: int) -> bytes:
    """The body as it was before it was compressed.

    encoding: the Content-Encoding header, "" and "identity" included. limit: bytes that the result may have; no more are ever
    held, whatever the body promises. Raises BadRequest, TooLarge, UnsupportedEncoding.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW:
        raise UnsupportedEncoding(f"Content-Encoding '{name[:40]}' is not known here: send gzip, deflate or none")
    decompressor = zlib.decompressobj(_WINDOW[name])
    try:
        result = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is no sound {name} data: {error}") from None
    if len(result) > limit:
        raise TooLarge(f"the body decompresses to more than the {limit} bytes that this server takes (--max-body-mb)")
    if not decompressor.eof:
        raise BadRequest(f"the body's {name} data end too early")
    if decompressor.unused_data:
        raise BadRequest(f"{len(decompressor.unused_data)} bytes follow the body's {name} data")
    return result
