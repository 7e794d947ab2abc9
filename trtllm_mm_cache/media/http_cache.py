"""Response bodies in memory, for hishel: least recently used out first, never above a number of bytes."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, replace

from hishel import AsyncBaseStorage, Entry, Headers, Request, Response

_ENTRY_OVERHEAD = 1024
"""Bytes charged for an entry's Python objects; its headers come on top."""


@dataclass
class _Stored:
    id: uuid.UUID
    request: Request
    response: Response
    chunks: tuple[bytes, ...]
    size: int


class MemoryStorage(AsyncBaseStorage):
    """One response for each key, in this process's memory.

    `capacity_bytes` bounds complete bodies, bodies still arriving and headers together. A body being
    read is held by its reader, so evicting or replacing its entry cannot cut it short. Every request
    of this package carries the same headers, so the newest response of a key replaces the one before
    it, whatever it varies on. Belongs to one event loop.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._capacity = capacity_bytes
        self._used = 0
        self._entries: OrderedDict[str, _Stored] = OrderedDict()
        self._keys: dict[uuid.UUID, str] = {}

    @property
    def current_bytes(self) -> int:
        """Bytes in use, arriving bodies included."""
        return self._used

    async def create_entry(
        self,
        request: Request,
        response: Response,
        key: str,
        *,
        ttl: float | None = None,
        tti: float | None = None,
    ) -> Entry:
        """Return an entry whose stream saves the body while it is read; see `AsyncBaseStorage`.

        Time limits of its own are not supported: HTTP's freshness rules decide.
        """
        if ttl is not None or tti is not None:
            raise ValueError("MemoryStorage keeps no time limits besides HTTP's own")
        entry_id = uuid.uuid4()
        return Entry(
            id=entry_id,
            request=request,
            response=replace(response, stream=self._saving(entry_id, request, response, key)),
        )

    async def get_entries(self, key: str) -> list[Entry]:
        """Return the complete response under `key`, or nothing."""
        stored = self._entries.get(key)
        if stored is None:
            return []
        self._entries.move_to_end(key)
        return [Entry(stored.id, stored.request, replace(stored.response, stream=_replay(stored.chunks)))]

    async def update_headers(self, id: uuid.UUID, headers: Headers) -> None:
        """Replace the headers of an entry, where it still exists."""
        key = self._keys.get(id)
        if key is None:
            return
        stored = self._entries[key]
        change = _fixed_bytes(key, headers) - _fixed_bytes(key, stored.response.headers)
        if not self._make_room(change, keep=key):
            self._drop(key)
            return
        self._used += change
        stored.size += change
        stored.response = replace(stored.response, headers=headers)

    async def remove_entry(self, id: uuid.UUID) -> None:
        """Forget an entry, where it still exists."""
        key = self._keys.get(id)
        if key is not None:
            self._drop(key)

    def clear(self) -> int:
        """Forget every entry and return how many there were."""
        count = len(self._entries)
        for key in list(self._entries):
            self._drop(key)
        return count

    async def close(self) -> None:
        """Free everything."""
        self.clear()

    async def _saving(
        self, entry_id: uuid.UUID, request: Request, response: Response, key: str
    ) -> AsyncIterator[bytes]:
        """Pass the body on; keep it once it is complete, where it fits."""
        chunks: list[bytes] | None = []
        charged = 0
        try:
            async for chunk in _body(response):
                if chunks is not None:
                    cost = len(chunk) + (0 if charged else _fixed_bytes(key, response.headers))
                    # A body that can never fit must not push the others out first.
                    if charged + cost <= self._capacity and self._make_room(cost):
                        self._used += cost
                        charged += cost
                        chunks.append(chunk)
                    else:
                        self._used -= charged
                        charged, chunks = 0, None
                yield chunk
            if chunks:
                self._drop(key)
                kept = replace(response, stream=None)
                self._entries[key] = _Stored(entry_id, request, kept, tuple(chunks), charged)
                self._keys[entry_id] = key
                charged = 0
        finally:
            self._used -= charged

    def _make_room(self, size: int, keep: str | None = None) -> bool:
        """Evict until `size` more bytes fit; say whether they do."""
        while self._used + size > self._capacity:
            victim = next((key for key in self._entries if key != keep), None)
            if victim is None:
                return False
            self._drop(victim)
        return True

    def _drop(self, key: str) -> None:
        stored = self._entries.pop(key, None)
        if stored is not None:
            del self._keys[stored.id]
            self._used -= stored.size


async def _replay(chunks: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _body(response: Response) -> AsyncIterator[bytes]:
    if isinstance(response.stream, AsyncIterable):
        async for chunk in response.stream:
            yield chunk


def _fixed_bytes(key: str, headers: Headers) -> int:
    return _ENTRY_OVERHEAD + len(key) + sum(len(name) + len(value) for name, value in headers.items())
