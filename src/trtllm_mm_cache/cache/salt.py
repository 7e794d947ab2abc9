"""What is kept of a salt with an entry, so that all entries of a tenant can be dropped."""

from __future__ import annotations

import blake3

TAG_BYTES = 16

_CONTEXT = "trtllm-mm-cache 2026 salt tag/1"


def salt_tag(salt: str) -> bytes:
    """Return 16 bytes that stand for `salt`: equal for equal salts, one way, of no use as a salt or a key."""
    return blake3.blake3(salt.encode("utf-8"), derive_key_context=_CONTEXT).digest(TAG_BYTES)
