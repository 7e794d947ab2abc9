"""data: URLs to bytes (RFC 2397, read as the WHATWG Fetch standard's data: URL processor does)."""

from __future__ import annotations

import contextlib
from urllib.parse import unquote_to_bytes

import pybase64

from trtllm_mm_cache.errors import MediaReferenceError, MediaTooLargeError


def decode_data_url(reference: str, max_bytes: int) -> bytes:
    """Return the bytes that a `data:` URL carries.

    Blocking, linear in the reference's length; thread-safe. The declared media type is not looked
    at: the bytes decide what they are. Percent escapes, white space inside base64 and missing
    padding are accepted; anything else outside the base64 alphabet is not.
    Raises `MediaReferenceError` for broken syntax, `MediaTooLargeError` before decoding more than
    `max_bytes`.
    """
    comma = reference.find(",")
    if comma < 0:
        raise MediaReferenceError("the data: URL has no comma between its media type and its data")
    # One copy of what may be megabytes, and none besides: copies cost more than the decoding.
    payload = reference[comma + 1 :]
    if not payload.isascii():
        raise MediaReferenceError("the data: URL has characters outside ASCII; percent-encode them")
    if reference[len("data:") : comma].rstrip(" ").lower().endswith(";base64"):
        return _decode_base64(payload, max_bytes)
    # At least this many; a % that begins no escape stands for itself and makes it more.
    check_size(len(payload) - 2 * payload.count("%"), max_bytes)
    decoded = unquote_to_bytes(payload)
    check_size(len(decoded), max_bytes)
    return decoded


def _decode_base64(text: str, max_bytes: int) -> bytes:
    if len(text) * 3 // 4 - 2 <= max_bytes:  # at most two are padding
        # Nearly every client's decodes as it is; looking for what does not costs more than the decoding.
        with contextlib.suppress(ValueError):
            decoded = pybase64.b64decode(text, validate=True)
            check_size(len(decoded), max_bytes)
            return decoded
    if any(each in text for each in "%\t\n\f\r "):
        text = unquote_to_bytes(text).translate(None, b"\t\n\f\r ").decode("latin-1")
    ending = text[-2:]
    padding = len(ending) - len(ending.rstrip("="))
    check_size((len(text) - padding) * 3 // 4, max_bytes)
    if padding == 0:
        text += "=" * (-len(text) % 4)
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise MediaReferenceError(
            "the data: URL is not valid base64; send RFC 4648 standard base64"
        ) from None


def check_size(size: int, max_bytes: int) -> None:
    """Raise `MediaTooLargeError` for more than `max_bytes`."""
    if size > max_bytes:
        raise MediaTooLargeError(
            f"the data: URL carries {size} bytes, more than the limit of {max_bytes}; send a smaller image"
        )
