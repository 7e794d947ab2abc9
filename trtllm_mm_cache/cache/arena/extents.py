"""Which bytes of a region are taken: allocation, release and coalescing of extents, without the bytes.

Holes lie in a list sorted by size, so the smallest hole that fits is one bisection away; blocks and
holes are filed by where they start and where they end, so a neighbour is one look-up away. Every
operation is O(log n).

Best fit: embeddings of one model have few sizes, so a hole that an entry left is usually taken again by
one of exactly its size, and large holes stay whole for large entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sortedcontainers import SortedList

from trtllm_mm_cache.errors import IntegrityError

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes from `offset` bytes after the start of the region; `offset` is a multiple of 64."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExtentStatistics:
    """A snapshot, all sizes in bytes.

    `used_bytes` is what the extents asked for, `padding_bytes` what alignment added to them;
    `fragmentation` is the share of the free bytes that lies outside the largest hole (0 when none is free).
    """

    capacity_bytes: int
    used_bytes: int
    padding_bytes: int
    free_bytes: int
    largest_hole_bytes: int
    extents: int
    holes: int
    fragmentation: float


@dataclass(frozen=True, slots=True)
class Relocation:
    """Extents, the new place allocated for each, and the holes between them that were allocated (claimed)."""

    old: tuple[Extent, ...]
    new: tuple[Extent, ...]
    claims: tuple[Extent, ...]


def aligned(nbytes: int) -> int:
    """Round up to a multiple of the alignment, the bytes an extent of `nbytes` takes from the region."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ExtentMap:
    """Free and taken bytes of a region of `capacity_bytes` (a multiple of 64). Not thread-safe."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0 or capacity_bytes % ALIGNMENT:
            raise IntegrityError(f"a region has a multiple of {ALIGNMENT} bytes, not {capacity_bytes}")
        self._capacity = capacity_bytes
        self._holes: SortedList = SortedList()
        self._hole_starts: dict[int, int] = {}
        self._hole_ends: dict[int, int] = {}
        self._extents: dict[int, Extent] = {}
        self._extent_ends: dict[int, Extent] = {}
        self._used = 0
        self._taken = 0
        if capacity_bytes:
            self._add_hole(0, capacity_bytes)

    def allocate(self, nbytes: int) -> Extent | None:
        """Take `nbytes` from the smallest hole that has them, or return None when no hole has.

        An extent of 0 bytes takes no room and lies at offset 0.
        """
        if nbytes < 0:
            raise IntegrityError(f"an extent cannot have {nbytes} bytes")
        if nbytes == 0:
            return Extent(0, 0)
        size = aligned(nbytes)
        position = self._holes.bisect_left((size, -1))
        if position == len(self._holes):
            return None
        hole_size, start = self._holes.pop(position)
        del self._hole_starts[start], self._hole_ends[start + hole_size]
        if hole_size > size:
            self._add_hole(start + size, hole_size - size)
        return self._add_extent(Extent(start, nbytes))

    def free(self, extent: Extent) -> None:
        """Free `extent` and join it with the holes beside it. `IntegrityError` if it is not taken."""
        if extent.nbytes == 0:
            return
        if self._extents.get(extent.offset) != extent:
            raise IntegrityError(f"the extent at {extent.offset} of {extent.nbytes} bytes is not allocated")
        size = aligned(extent.nbytes)
        del self._extents[extent.offset]
        del self._extent_ends[extent.offset + size]
        self._used -= extent.nbytes
        self._taken -= size
        self._join_hole(extent.offset, extent.offset + size)

    def relocate(self, extents: Sequence[Extent], start: int, end: int, nbytes: int) -> Relocation | None:
        """Begin to move `extents`, which with holes fill `start` to `end`, so that `nbytes` fit there.

        Allocates a place for each, none overlapping an old one, and the holes that will be part of the new
        hole. Returns None, with nothing changed, when the holes elsewhere and what is left over here cannot
        take them. The caller copies the bytes; then it frees each old extent, or, where one has to stay
        after all, its place, and the claims.
        """
        window_holes = self._take_holes(start, end)
        inner_start, inner_end = _narrow(extents, start, end, aligned(nbytes))
        leftovers = [(start, inner_start - start), (inner_end, end - inner_end)]
        leftovers = [(offset, size) for offset, size in leftovers if size]
        for offset, size in leftovers:
            self._add_hole(offset, size)
        places: dict[Extent, Extent] = {}
        for old in sorted(extents, key=lambda extent: extent.nbytes, reverse=True):
            new = self.allocate(old.nbytes)
            if new is None:
                for place in places.values():
                    self.free(place)
                for offset, _ in leftovers:
                    self._remove_hole(offset)
                for hole_start, size in window_holes:
                    self._add_hole(hole_start, size)
                return None
            places[old] = new
        claims = []
        for offset, size in window_holes:
            first, last = max(offset, inner_start), min(offset + size, inner_end)
            if first < last:
                claims.append(self._add_extent(Extent(first, last - first)))
        return Relocation(tuple(extents), tuple(places[old] for old in extents), tuple(claims))

    @property
    def used_bytes(self) -> int:
        """Sum of the sizes that were asked for, without padding."""
        return self._used

    @property
    def largest_hole_bytes(self) -> int:
        """Size of the largest extent that `allocate` would grant now."""
        return self._holes[-1][0] if self._holes else 0

    @property
    def free_bytes(self) -> int:
        """Bytes of all holes together."""
        return self._capacity - self._taken

    def largest_holes(self, count: int) -> list[tuple[int, int]]:
        """Return start and end of the `count` largest holes, largest first."""
        return [(start, start + size) for size, start in reversed(self._holes[-count:])]

    def extent_ending_at(self, offset: int) -> Extent | None:
        """Return the extent whose padded end is at `offset`."""
        return self._extent_ends.get(offset)

    def extent_starting_at(self, offset: int) -> Extent | None:
        """Return the extent that starts at `offset`."""
        return self._extents.get(offset)

    def hole_ending_at(self, offset: int) -> int:
        """Return the size of the hole that ends at `offset`, 0 if none does."""
        start = self._hole_ends.get(offset)
        return 0 if start is None else offset - start

    def hole_starting_at(self, offset: int) -> int:
        """Return the size of the hole that starts at `offset`, 0 if none does."""
        return self._hole_starts.get(offset, 0)

    def statistics(self) -> ExtentStatistics:
        """Return a snapshot."""
        free = self._capacity - self._taken
        largest = self.largest_hole_bytes
        return ExtentStatistics(
            capacity_bytes=self._capacity,
            used_bytes=self._used,
            padding_bytes=self._taken - self._used,
            free_bytes=free,
            largest_hole_bytes=largest,
            extents=len(self._extents),
            holes=len(self._holes),
            fragmentation=1.0 - largest / free if free else 0.0,
        )

    def check_integrity(self) -> None:
        """Walk the region from end to end. Raises `IntegrityError` unless extents and holes tile it exactly,
        no two holes touch, and every index and counter agrees."""
        offset, used, taken, holes, after_hole = 0, 0, 0, 0, False
        while offset < self._capacity:
            extent, hole = self._extents.get(offset), self._hole_starts.get(offset)
            if (extent is None) == (hole is None):
                raise IntegrityError(f"the byte at {offset} is {'free and taken' if extent else 'lost'}")
            if extent is not None:
                size, after_hole = aligned(extent.nbytes), False
                used, taken = used + extent.nbytes, taken + size
                if extent.offset != offset or self._extent_ends.get(offset + size) != extent:
                    raise IntegrityError(f"the extent at {offset} is filed wrongly")
            else:
                size = hole or 0
                holes += 1
                if after_hole or size <= 0 or self._hole_ends.get(offset + size) != offset:
                    raise IntegrityError(f"the hole at {offset} is empty, not coalesced, or filed wrongly")
                if (size, offset) not in self._holes:
                    raise IntegrityError(f"the hole at {offset} is missing from the sorted list")
                after_hole = True
            offset += size
        if offset != self._capacity or (used, taken) != (self._used, self._taken):
            raise IntegrityError(
                f"{used} of {taken} taken bytes counted, {self._used} of {self._taken} recorded"
            )
        if not holes == len(self._holes) == len(self._hole_starts) == len(self._hole_ends):
            raise IntegrityError("the indexes of the holes disagree")
        if len(self._extents) != len(self._extent_ends):
            raise IntegrityError("the indexes of the extents disagree")

    def _take_holes(self, start: int, end: int) -> list[tuple[int, int]]:
        """Remove the holes between `start` and `end`; return their starts and sizes."""
        taken = []
        offset = start
        while offset < end:
            if offset in self._hole_starts:
                size = self._remove_hole(offset)
                taken.append((offset, size))
            else:
                size = aligned(self._extents[offset].nbytes)
            offset += size
        return taken

    def _join_hole(self, start: int, end: int) -> None:
        """Make `start` to `end` a hole, one with the holes beside it."""
        before = self._hole_ends.get(start)
        if before is not None:
            self._remove_hole(before)
            start = before
        if end in self._hole_starts:
            end += self._remove_hole(end)
        self._add_hole(start, end - start)

    def _add_extent(self, extent: Extent) -> Extent:
        size = aligned(extent.nbytes)
        self._extents[extent.offset] = extent
        self._extent_ends[extent.offset + size] = extent
        self._used += extent.nbytes
        self._taken += size
        return extent

    def _add_hole(self, start: int, size: int) -> None:
        self._holes.add((size, start))
        self._hole_starts[start] = size
        self._hole_ends[start + size] = start

    def _remove_hole(self, start: int) -> int:
        size = self._hole_starts.pop(start)
        del self._hole_ends[start + size]
        self._holes.remove((size, start))
        return size


def _narrow(extents: Sequence[Extent], start: int, end: int, size: int) -> tuple[int, int]:
    """Return the part of a window, at either end of it, that has `size` bytes and all of `extents`."""
    first = min((extent.offset for extent in extents), default=end)
    last = max((extent.offset + aligned(extent.nbytes) for extent in extents), default=start)
    right, left = min(first, end - size), max(last, start + size)
    return (right, end) if right - start > end - left else (start, left)
