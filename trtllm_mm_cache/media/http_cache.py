"""HTTP responses in memory: least recently used out first, never above a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from trtllm_mm_cache.media.freshness import Reuse

_ENTRY_OVERHEAD = 1024
"""Bytes charged for an entry's Python objects and its key; header fields and body come on top."""


@dataclass(frozen=True)
class CachedResponse:
    """A complete response: its decoded `body` or the `location` it redirects to, and what reuse it allows."""

    reuse: Reuse
    body: bytes = field(default=b"", repr=False)
    location: str | None = field(default=None, repr=False)

    @property
    def worth_keeping(self) -> bool:
        """Whether it may be stored, and could be used again: fresh for some time, or named by a validator.

        A redirect is used again only while it is fresh: to ask for it costs as much as to get it.
        """
        askable = self.location is None and bool(self.reuse.conditions)
        return self.reuse.storable and (self.reuse.lifetime > 0 or askable)

    @property
    def nbytes(self) -> int:
        """What it is charged with."""
        fields = sum(len(name) + len(line) for name, lines in self.reuse.fields.items() for line in lines)
        return _ENTRY_OVERHEAD + fields + len(self.body) + len(self.location or "")


class ResponseCache:
    """At most `capacity_bytes` of responses by key. For use from one thread."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._responses: OrderedDict[str, CachedResponse] = OrderedDict()
        self.current_bytes = 0

    def get(self, key: str) -> CachedResponse | None:
        """Return the response under `key`, fresh or not, or None; it now is the one used last."""
        response = self._responses.get(key)
        if response is not None:
            self._responses.move_to_end(key)
        return response

    def put(self, key: str, response: CachedResponse) -> None:
        """Replace what is under `key`: by `response` where it is worth keeping and fits, else by nothing."""
        self._drop(key)
        # A response that can never fit must not push the others out first.
        if response.worth_keeping and response.nbytes <= self._capacity:
            while self.current_bytes + response.nbytes > self._capacity:
                self._drop(next(iter(self._responses)))
            self._responses[key] = response
            self.current_bytes += response.nbytes

    def clear(self) -> int:
        """Forget every response and return how many there were."""
        count = len(self._responses)
        self._responses.clear()
        self.current_bytes = 0
        return count

    def _drop(self, key: str) -> None:
        response = self._responses.pop(key, None)
        if response is not None:
            self.current_bytes -= response.nbytes
