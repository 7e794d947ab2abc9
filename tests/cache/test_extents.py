"""The extent map against a model that keeps one byte of state for every 64 bytes of the region."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from trtllm_mm_cache.cache.arena.extents import ALIGNMENT, Extent, ExtentMap, aligned
from trtllm_mm_cache.cache.arena.windows import cheapest_windows
from trtllm_mm_cache.errors import IntegrityError

CELLS = 40
CAPACITY = CELLS * ALIGNMENT


class ExtentMachine(RuleBasedStateMachine):
    """Random allocations, releases and relocations; `owners` is the model."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.map = ExtentMap(CAPACITY)
        self.owners: list[Extent | None] = [None] * CELLS

    def holes(self) -> list[int]:
        runs = "".join("x" if owner else " " for owner in self.owners).split("x")
        return [len(run) * ALIGNMENT for run in runs if run]

    def claim(self, extent: Extent) -> None:
        cells = _cells(extent)
        assert all(self.owners[cell] is None for cell in cells), "extents overlap"
        for cell in cells:
            self.owners[cell] = extent

    def release(self, extent: Extent) -> None:
        for cell in _cells(extent):
            assert self.owners[cell] == extent
            self.owners[cell] = None

    @rule(target=extents, nbytes=st.integers(0, CAPACITY + 1))
    def allocate(self, nbytes: int) -> object:
        fitting = [hole for hole in self.holes() if hole >= nbytes]
        extent = self.map.allocate(nbytes)
        if extent is None:
            assert nbytes
            assert not fitting
            return multiple()
        assert extent.nbytes == nbytes
        assert extent.offset % ALIGNMENT == 0
        if nbytes:
            before = sorted(self.holes())
            self.claim(extent)
            shrunk = [
                hole
                for hole in before
                if hole not in self.holes() or before.count(hole) > self.holes().count(hole)
            ]
            assert min(fitting) in shrunk, "not the smallest hole that fits"
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        if extent.nbytes == 0:
            self.map.free(extent)
            return
        if self.owners[extent.offset // ALIGNMENT] != extent:
            return  # it was moved
        self.free_one(extent)
        with pytest.raises(IntegrityError):
            self.map.free(extent)

    def free_one(self, extent: Extent) -> None:
        self.map.free(extent)
        self.release(extent)

    @rule(
        target=extents,
        nbytes=st.integers(1, CAPACITY),
        pinned=st.sets(st.integers(0, CELLS - 1)),
        staying=st.just(set()) | st.sets(st.integers(0, 4)),
    )
    def relocate(self, nbytes: int, pinned: set[int], staying: set[int]) -> object:
        def movable(extent: Extent) -> bool:
            return extent.offset // ALIGNMENT not in pinned

        for window in cheapest_windows(self.map, nbytes, movable):
            assert window.end - window.start >= nbytes
            assert all(movable(extent) for extent in window.extents)
            before = self.map.statistics()
            moving = self.map.relocate(window.extents, window.start, window.end, nbytes)
            if moving is None:
                assert self.map.statistics() == before
                continue
            assert moving.old == window.extents
            for extent in (*moving.new, *moving.claims):
                self.claim(extent)  # while the old ones still have their places: bytes are copied
            self.agrees_with_the_model()
            kept = []
            for number, (old, new) in enumerate(zip(moving.old, moving.new, strict=True)):
                assert new.nbytes == old.nbytes
                stays = number in staying
                kept.append(old if stays else new)
                self.free_one(new if stays else old)
            for extent in moving.claims:
                self.free_one(extent)
            assert self.map.largest_hole_bytes >= aligned(nbytes) or staying
            return multiple(*kept)
        return multiple()

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.map.check_integrity()
        snapshot = self.map.statistics()
        holes = self.holes()
        live = {owner for owner in self.owners if owner}
        assert snapshot.free_bytes == sum(holes) == self.map.free_bytes
        assert snapshot.largest_hole_bytes == max(holes, default=0)
        assert snapshot.holes == len(holes)
        assert snapshot.extents == len(live)
        assert snapshot.used_bytes == sum(extent.nbytes for extent in live)
        assert snapshot.used_bytes + snapshot.padding_bytes + snapshot.free_bytes == CAPACITY
        assert snapshot.fragmentation == (1 - max(holes) / sum(holes) if holes else 0.0)


def _cells(extent: Extent) -> range:
    return range(extent.offset // ALIGNMENT, (extent.offset + aligned(extent.nbytes)) // ALIGNMENT)


TestExtentMachine = ExtentMachine.TestCase
TestExtentMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_extent_of_another_size_at_the_same_offset_is_not_freed() -> None:
    extents = ExtentMap(CAPACITY)
    taken = extents.allocate(100)
    assert taken is not None
    with pytest.raises(IntegrityError, match="not allocated"):
        extents.free(Extent(taken.offset, 101))
    extents.check_integrity()


@pytest.mark.parametrize("capacity", [-64, 63, 100])
def test_a_region_is_a_multiple_of_the_alignment(capacity: int) -> None:
    with pytest.raises(IntegrityError):
        ExtentMap(capacity)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(IntegrityError):
        ExtentMap(CAPACITY).allocate(-1)
