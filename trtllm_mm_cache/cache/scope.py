"""Whose an item is, whether its embedding may be kept, and which embeddings a drop selects."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

import blake3

TAG_BYTES = 16

_CONTEXT = "trtllm-mm-cache 2026 salt tag/1"


def salt_tag(salt: str) -> bytes:
    """Return 16 bytes that stand for `salt`: equal for equal salts, one way, of no use as a salt or a key."""
    return blake3.blake3(salt.encode("utf-8"), derive_key_context=_CONTEXT).digest(TAG_BYTES)


@dataclass(frozen=True, slots=True)
class Scope:
    """One object from the request to the last tier. Make it with `of`, or, where a salt is not known, by tag.

    `salt` separates tenants: it is part of the key, and None shares with everybody who has none either.
    `tag` is what is kept of the salt with an entry, so that all of a tenant can be dropped. Without `retain`
    nothing of the item may outlive its request: no entry, no tier, no fetched file.
    """

    salt: str | None = field(default=None, repr=False)
    tag: bytes | None = None
    retain: bool = True

    @classmethod
    def of(cls, salt: str | None, *, require_salt: bool = False) -> Scope:
        """Return the scope of a request with `salt` (None or "": it has none).

        With `require_salt` a request without one gets a random salt of its own, so that no key of it can meet
        another request's, here or elsewhere, and is not retained.
        """
        if salt:
            return cls(salt, salt_tag(salt))
        return cls(secrets.token_hex(32), retain=False) if require_salt else cls()


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects the entries of one `key`, of one `tag`, or of one `content`; with none of them, all."""

    key: str | None = None
    tag: bytes | None = None
    content: bytes | None = None

    def matches(self, key: str, tag: bytes | None, content: bytes | None) -> bool:
        """Whether an entry with this key, tag and content is selected."""
        return self.key in (None, key) and self.tag in (None, tag) and self.content in (None, content)


class Dropped(NamedTuple):
    """What a drop made invisible."""

    keys: tuple[str, ...]
    nbytes: int

    @property
    def entries(self) -> int:
        """How many entries."""
        return len(self.keys)
