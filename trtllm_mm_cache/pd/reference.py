"""One media part of a request, and the memory that its bytes take."""

from __future__ import annotations

from trtllm_mm_cache.cache.key import Kind

_INLINE = "data:"
_ENDS = 1024


class Reference:
    """What a media part is, and where its bytes come from: a URL, or the bytes themselves.

    `nbytes` is what the request brought of them: the length of a data: URL or of the bytes, 0 for what has
    yet to be fetched. They are held until `take`, which whoever reads them calls once.
    Two are equal that stand for the same by the same words; only before they are taken.
    """

    __slots__ = ("_source", "kind", "nbytes")

    def __init__(self, kind: Kind, source: str | bytes) -> None:
        self.kind = kind
        self._source = source
        inline = isinstance(source, bytes) or source[: len(_INLINE)].lower() == _INLINE
        self.nbytes = len(source) if inline else 0

    def take(self) -> str | bytes:
        """Return the URL or the bytes, and forget them."""
        source, self._source = self._source, b""
        return source

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference):
            return NotImplemented
        return self.kind == other.kind and self._source == other._source

    def __hash__(self) -> int:
        # Not of the whole: that of megabytes would hold up the event loop. A collision that a client makes
        # costs comparisons alone, of at most as many parts as a request may have.
        return hash((self.kind, len(self._source), self._source[:_ENDS], self._source[-_ENDS:]))

    def __repr__(self) -> str:
        return f"Reference({self.kind!r}, {self.nbytes} bytes inline)"
