"""Which entries a tier may serve, and what it writes into the header of those that it stores."""

from __future__ import annotations

import time
from collections.abc import Callable

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.tiers.format import HEADER_BYTES, EntryName, Header, RefusedEntryError, Sealer


class EntryRules:
    """The rules of one deployment's tiers. Immutable; any thread.

    `fingerprint` is the model's; entries older than `max_age_s` are not served (None: no entry is too old).
    `clock` counts seconds since 1970.
    """

    def __init__(
        self,
        sealer: Sealer,
        fingerprint: str,
        *,
        max_age_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.sealer = sealer
        self.fingerprint = fingerprint
        self.max_age_s = max_age_s
        self._clock = clock

    def admitted(self, header: bytes, size: int, name: EntryName) -> Header:
        """Return the header of an entry of `size` bytes that may be served for `name`.

        Raises `RefusedEntryError`. Its payload is not looked at.
        """
        found = self.sealer.open(header, name.key)
        if found.tag != name.tag:
            raise _refused("other_key", "an entry of another salt")
        if found.fingerprint != self.fingerprint:
            raise _refused("foreign_model", "an entry of another model")
        if size != HEADER_BYTES + found.nbytes:
            raise _refused("truncated", f"an entry of {size} bytes that announces {found.nbytes}")
        if self.max_age_s is not None and self._clock() - found.made_at > self.max_age_s:
            raise _refused("expired", "an entry that is too old")
        return found

    def authentic(self, header: bytes, key: str) -> Header | None:
        """Return the header of an entry of this deployment, also of another model; None if it is none."""
        try:
            return self.sealer.open(header, key)
        except RefusedEntryError:
            return None

    def judge(self, header: bytes, key: str) -> Header | None:
        """Return the header of an entry that may be served, or None."""
        try:
            found = self.sealer.open(header, key)
            return self.admitted(header, HEADER_BYTES + found.nbytes, EntryName(key, found.tag))
        except RefusedEntryError:
            return None

    def sealed(
        self, name: EntryName, kind: str, content: bytes | None, lease: Lease, payload: memoryview
    ) -> bytes | None:
        """Return the header for what `lease` holds; None where it does not fit. Hashes the `payload`."""
        rows, width = lease.shape
        return self.sealer.seal(
            Header(
                kind=kind,
                key=name.key,
                fingerprint=self.fingerprint,
                tag=name.tag,
                content=content,
                nbytes=lease.nbytes,
                dtype=str(lease.dtype).removeprefix("torch."),
                shape=(rows, width),
                metadata=lease.metadata,
                made_at=self._clock(),
                payload_seal=self.sealer.payload_seal(payload),
            )
        )


def _refused(reason: str, what: str) -> RefusedEntryError:
    return RefusedEntryError(f"{what} lies in a tier; it is not served", reason=reason)  # type: ignore[arg-type]
