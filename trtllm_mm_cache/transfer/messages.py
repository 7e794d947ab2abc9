"""What the two sides tell each other out of band: who to READ from, and what lies there."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import blake3

from trtllm_mm_cache.cache.arena.place import ArenaPlace
from trtllm_mm_cache.errors import ProtocolMismatchError, TransferError

WIRE_VERSION = 1

MAX_METADATA_BYTES = 256 * 1024
"""Bound on NIXL metadata: one region takes 451 bytes, 2000 regions take 88 KB."""

RELEASE = b"release "
"""A notification is the token alone, the ack: all was READ; or this before it: nothing will be READ."""

_AGENT_NAME = re.compile(r"[0-9A-Za-z._-]{1,128}")


@dataclass(frozen=True)
class Export:
    """One embedding that lies ready in an exporter's memory.

    `address` is valid in the exporting process only, for `nbytes` bytes, until the reader's notification
    `token` arrives there or the exporter's lease times out. `checksum` is XXH3-64 over those bytes.
    """

    token: str
    address: int
    nbytes: int
    checksum: int


@dataclass(frozen=True)
class PeerMetadata:
    """The NIXL metadata of one process: where its agent listens and what memory it registered.

    `digest` is BLAKE3 over name and metadata. NIXL accepts some damaged metadata without complaint, so an
    instance cannot be made with a digest that does not match: whoever holds one may hand it to NIXL.
    The digest tells damage, not forgery; the request plane that carries it is trusted.
    `arena` is where a reader on the same machine finds the registered memory, where that is one arena.
    Raises `TransferError` for damaged metadata.
    """

    agent_name: str
    metadata: bytes
    digest: str
    arena: ArenaPlace | None = None

    def __post_init__(self) -> None:
        if len(self.metadata) > MAX_METADATA_BYTES:
            raise TransferError(
                f"NIXL metadata of {len(self.metadata)} bytes is larger than the {MAX_METADATA_BYTES} bytes "
                "accepted; register few large regions instead of many small ones"
            )
        if self.digest != _digest(self.agent_name, self.metadata):
            raise TransferError(
                "the peer's NIXL metadata arrived damaged: its digest does not match; ask for it again"
            )

    @classmethod
    def of(cls, agent_name: str, metadata: bytes) -> PeerMetadata:
        """Seal the metadata that a local NIXL agent reported."""
        return cls(agent_name, metadata, _digest(agent_name, metadata))

    def with_arena(self, arena: ArenaPlace) -> PeerMetadata:
        """Return the same with the place of the arena that is registered."""
        return replace(self, arena=arena)

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON-safe form; `from_wire` is its exact inverse."""
        return {
            "arena": None if self.arena is None else asdict(self.arena),
            "version": WIRE_VERSION,
            "agent_name": self.agent_name,
            "metadata": base64.b64encode(self.metadata).decode("ascii"),
            "digest": self.digest,
        }

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> PeerMetadata:
        """Rebuild what `to_wire` made, without giving anything to NIXL.

        Raises `ProtocolMismatchError` for another version or form, `TransferError` for damaged content.
        """
        version = payload.get("version")
        if version != WIRE_VERSION:
            raise ProtocolMismatchError(
                f"the peer sends NIXL metadata in version {version!r:.20} and this worker reads version "
                f"{WIRE_VERSION}; run the same release on both workers"
            )
        name, encoded, digest = (payload.get(field) for field in ("agent_name", "metadata", "digest"))
        if not (isinstance(name, str) and isinstance(encoded, str) and isinstance(digest, str)):
            raise ProtocolMismatchError(
                "the peer's NIXL metadata lacks agent_name, metadata or digest; "
                "run the same release on both workers"
            )
        if not _AGENT_NAME.fullmatch(name) or len(encoded) > 2 * MAX_METADATA_BYTES:
            raise TransferError("the peer's NIXL metadata has an impossible name or size; ask for it again")
        try:
            metadata = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise TransferError("the peer's NIXL metadata is not valid base64; ask for it again") from None
        return cls(name, metadata, digest, _arena(payload.get("arena")))


def _arena(payload: Any) -> ArenaPlace | None:
    if payload is None:
        return None
    types = {"machine": str, "file": str, "nbytes": int, "identity": str, "address": int}
    if isinstance(payload, dict) and {name: type(value) for name, value in payload.items()} == types:
        return ArenaPlace(**payload)
    raise ProtocolMismatchError(
        "the peer describes its arena in a form that this worker does not read; run the same release on both "
        "workers"
    )


def _digest(agent_name: str, metadata: bytes) -> str:
    name = agent_name.encode()
    return blake3.blake3(len(name).to_bytes(4, "little") + name + metadata).hexdigest()
