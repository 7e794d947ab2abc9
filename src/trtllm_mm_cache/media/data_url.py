"""data: URLs to bytes (RFC 2397, read as the WHATWG Fetch standard's data: URL processor does)."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

import pybase64

from trtllm_mm_cache.errors import MediaReferenceError, MediaTooLargeError

_ASCII_WHITESPACE = b"\t\n\x0c\r "


def decode_data_url(reference: str, max_bytes: int) -> bytes:
    """Return the bytes that a `data:` URL carries.

    Blocking, linear in the reference's length; thread-safe. The declared media type is not looked
    at: the bytes decide what they are. Percent escapes, white space inside base64 and missing
    padding are accepted; anything else outside the base64 alphabet is not.
    Raises `MediaReferenceError` for broken syntax, `MediaTooLargeError` before decoding more than
    `max_bytes`.
    """
    header, comma, payload = reference[len("data:") :].partition(",")
    if not comma:
        raise MediaReferenceError("the data: URL has no comma between its media type and its data")
    try:
        encoded = payload.encode("ascii")
    except UnicodeEncodeError:
        raise MediaReferenceError("the data: URL has characters outside ASCII; percent-encode them") from None
    if header.rstrip(" ").lower().endswith(";base64"):
        return _decode_base64(encoded, max_bytes)
    # At least this many; a % that begins no escape stands for itself and makes it more.
    _check_size(len(encoded) - 2 * encoded.count(b"%"), max_bytes)
    decoded = unquote_to_bytes(encoded)
    _check_size(len(decoded), max_bytes)
    return decoded


def _decode_base64(encoded: bytes, max_bytes: int) -> bytes:
    if b"%" in encoded:
        encoded = unquote_to_bytes(encoded)
    if any(byte in encoded for byte in (b"\n", b"\r", b" ", b"\t", b"\x0c")):
        encoded = encoded.translate(None, _ASCII_WHITESPACE)
    _check_size(len(encoded.rstrip(b"=")) * 3 // 4, max_bytes)
    if b"=" not in encoded:
        encoded += b"=" * (-len(encoded) % 4)
    try:
        return pybase64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise MediaReferenceError(
            "the data: URL is not valid base64; send RFC 4648 standard base64"
        ) from None


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaTooLargeError(
            f"the data: URL carries {size} bytes, more than the limit of {max_bytes}; send a smaller image"
        )
