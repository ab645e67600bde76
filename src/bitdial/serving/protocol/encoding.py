"""Compressed request bodies, and how much they may grow to."""

from __future__ import annotations

import zlib

from bitdial.serving.errors import BadRequest, TooLarge, UnsupportedEncoding

# window bits of zlib by Content-Encoding; HTTP's "deflate" is the zlib format
_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_GZIP = b"\x1f\x8b"  # how each member begins
MOST_MEMBERS = 4096  # of one body; empty ones cost time and no bytes to speak of
_PIECE = 1 << 14  # bytes at a time, so that little is copied from one member to the next


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
    decompressor, parts, size, members, at = zlib.decompressobj(_WINDOW[name]), list[bytes](), 0, 1, 0
    while at < len(body):
        if decompressor.eof:  # what follows is one more member, as tools write that compress in pieces (RFC 1952, 2.2)
            left = len(body) - at
            if _WINDOW[name] != 31 or body[at : at + 2] != _GZIP:
                raise BadRequest(f"{left} bytes follow the body's {name} data")
            members += 1
            if members > MOST_MEMBERS:
                raise BadRequest(f"the body's gzip data have more than {MOST_MEMBERS} members: send larger ones")
            decompressor = zlib.decompressobj(_WINDOW[name])
        piece = body[at : at + _PIECE]
        try:
            part = decompressor.decompress(piece, limit + 1 - size)
        except zlib.error as error:
            raise BadRequest(f"the body is no sound {name} data: {error}") from None
        size += len(part)
        if size > limit:
            raise TooLarge(
                f"the body decompresses to more than the {limit} bytes that this server takes (--max-body-mb)"
            )
        parts.append(part)
        at += len(piece) - len(decompressor.unused_data)
    if not decompressor.eof:
        raise BadRequest(f"the body's {name} data end too early")
    return b"".join(parts)
