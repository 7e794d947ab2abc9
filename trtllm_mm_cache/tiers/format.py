"""How an embedding lies in a tier: 4,096 bytes of header, then the tensor's bytes. The same in every tier.

    offset  bytes  what
    0       7      "MMCACHE"
    7       1      version of this format, 1
    8       8      which secret sealed it: the first 8 bytes of a digest of the secret
    16      32     seal of the payload: keyed BLAKE3-256 over the tensor's bytes
    48      32     seal of the header: keyed BLAKE3-256 over everything in the header but this field
    80      2      how many bytes of fields follow, big-endian
    82      n      the fields: a JSON object, compressed with zlib
    82 + n         zeros up to 4,096

Both keys are derived from one secret. The payload's seal lies in the sealed header, and so does the key of
the embedding: the two seals together are a checksum, bind the bytes to their key and their header, and prove
who wrote them. Whoever can write to a tier and lacks the secret can make it answer with nothing, and no more.
That the header has a seal of its own lets it be believed before room is made for what it announces.

`tests/tiers/format_vectors.json` has a sealed entry for implementations in other languages.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal, get_args

import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.cache.key import Buffer
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import TransferError
from trtllm_mm_cache.runtime.messages import MAX_EMBEDDING_BYTES, HexDigest, SaltTag

HEADER_BYTES: Final = 4096
VERSION: Final = 1

_MAGIC = b"MMCACHE"
_ID, _PAYLOAD, _HEADER, _LENGTH, _FIELDS = 8, 16, 48, 80, 82
_SEAL_BYTES = 32
_CONTEXT = "trtllm-mm-cache 2026 tier {}/1"
# A placeholder's text may have megabytes, of few words: it shrinks to a thousandth.
_MOST_FIELD_BYTES = 8 * 1024 * 1024

Refusal = Literal[
    "garbage",
    "foreign_version",
    "foreign_secret",
    "damaged",
    "truncated",
    "other_key",
    "foreign_model",
    "expired",
]
"""Why an entry is not served: no header of ours; another version of the format; sealed with another secret; a
seal does not fit; fewer or more bytes than announced; another key's entry; another model's; too old."""

REFUSALS: Final[tuple[Refusal, ...]] = get_args(Refusal)


class RefusedEntryError(TransferError):
    """An entry that lies in a tier is not what it should be; `reason` is counted."""

    code = "refused_entry"

    def __init__(
        self,
        message: str,
        *,
        reason: Refusal = "damaged",
        item_index: int | None = None,
        kind: str = "image",
    ) -> None:
        super().__init__(message, item_index=item_index, kind=kind)
        self.reason: Refusal = reason


@dataclass(frozen=True, slots=True)
class EntryName:
    """What finds an entry: its key in hex, and the tag of its salt, which the key implies."""

    key: str
    tag: bytes | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What an entry says of itself: `nbytes` bytes are a `shape` of the torch dtype named `dtype`.

    `content` is the digest of the item's media where it was known. `made_at` is in seconds since 1970.
    """

    kind: str
    key: str
    fingerprint: str
    tag: bytes | None
    content: bytes | None
    nbytes: int
    dtype: str
    shape: tuple[int, int]
    metadata: EmbeddingMetadata
    made_at: float
    payload_seal: bytes = field(default=b"", repr=False)

    def selected_by(self, selection: Selection) -> bool:
        """Whether a drop concerns it."""
        return selection.matches(self.key, self.tag, self.content)


class _Fields(BaseModel):
    """The header's JSON, read strictly: what a newer version adds needs another version number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[str, Field(max_length=32)]
    key: HexDigest
    fingerprint: HexDigest
    tag: SaltTag | None
    content: HexDigest | None
    nbytes: Annotated[int, Field(gt=0, le=MAX_EMBEDDING_BYTES)]
    dtype: Annotated[str, Field(max_length=32)]
    shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    metadata: EmbeddingMetadata
    made_at: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Sealer:
    """Seals and opens entries with one secret. Immutable; any thread."""

    def __init__(self, secret: bytes) -> None:
        self._payload_key, self._header_key, identity = (
            blake3.blake3(secret, derive_key_context=_CONTEXT.format(use)).digest()
            for use in ("payload", "header", "identity")
        )
        self._identity = identity[: _PAYLOAD - _ID]

    def payload_hasher(self) -> blake3.blake3:
        """Return what makes of a payload, given in pieces, its seal."""
        return blake3.blake3(key=self._payload_key)

    def payload_seal(self, payload: Buffer) -> bytes:
        """Return the seal of a payload: 1.2 ms for 10 MB, without the GIL."""
        return self.payload_hasher().update(payload).digest()

    def seal(self, header: Header) -> bytes | None:
        """Return the header as `HEADER_BYTES` bytes, or None where its texts do not fit into them."""
        fields = zlib.compress(_to_json(header))
        if len(fields) > HEADER_BYTES - _FIELDS:
            return None
        before = _MAGIC + bytes([VERSION]) + self._identity + header.payload_seal
        after = (len(fields).to_bytes(2, "big") + fields).ljust(HEADER_BYTES - _LENGTH, b"\0")
        return before + self._header_seal(before, after) + after

    def open(self, data: bytes, key: str) -> Header:
        """Return the header of the entry of `key` that `data` begins with, which is authentic then.

        Raises `RefusedEntryError`. The payload is not looked at: see `payload_hasher`.
        """
        if len(data) < HEADER_BYTES:
            raise _refused("truncated")
        if data[: len(_MAGIC)] != _MAGIC:
            raise _refused("garbage")
        if data[len(_MAGIC)] != VERSION:
            raise _refused("foreign_version")
        if data[_ID:_PAYLOAD] != self._identity:
            raise _refused("foreign_secret")
        before, after = data[:_HEADER], data[_LENGTH:HEADER_BYTES]
        if self._header_seal(before, after) != data[_HEADER:_LENGTH]:
            raise _refused("damaged")
        header = _from_json(after[2 : 2 + int.from_bytes(after[:2], "big")], data[_PAYLOAD:_HEADER])
        if header.key != key:
            raise _refused("other_key")
        return header

    def _header_seal(self, before: bytes, after: bytes) -> bytes:
        return blake3.blake3(before, key=self._header_key).update(after).digest()


def _to_json(header: Header) -> bytes:
    return json.dumps(
        {
            "kind": header.kind,
            "key": header.key,
            "fingerprint": header.fingerprint,
            "tag": None if header.tag is None else header.tag.hex(),
            "content": None if header.content is None else header.content.hex(),
            "nbytes": header.nbytes,
            "dtype": header.dtype,
            "shape": header.shape,
            "metadata": asdict(header.metadata),
            "made_at": header.made_at,
        }
    ).encode()


def _from_json(compressed: bytes, payload_seal: bytes) -> Header:
    """Read fields whose seal is right: what is wrong with them now is their writer's mistake."""
    try:
        text = zlib.decompressobj().decompress(compressed, _MOST_FIELD_BYTES)
        fields = _Fields.model_validate_json(text)
    except (zlib.error, ValidationError) as error:
        raise _refused("garbage") from error
    return Header(
        kind=fields.kind,
        key=fields.key,
        fingerprint=fields.fingerprint,
        tag=_bytes(fields.tag),
        content=_bytes(fields.content),
        nbytes=fields.nbytes,
        dtype=fields.dtype,
        shape=fields.shape,
        metadata=fields.metadata,
        made_at=fields.made_at,
        payload_seal=payload_seal,
    )


def _bytes(digits: Any) -> bytes | None:
    return None if digits is None else bytes.fromhex(digits)


def _refused(reason: Refusal) -> RefusedEntryError:
    return RefusedEntryError(f"an entry that lies in a tier is refused: {reason}", reason=reason)
