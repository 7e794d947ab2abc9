"""Dropping by key, by tag, by content and everything: gone for look-ups at once, valid for its holders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Selection

NBYTES = 256


@pytest.fixture
def manager() -> Iterator[MultimodalEmbeddingCacheManager]:
    manager = MultimodalEmbeddingCacheManager(16 * NBYTES)
    for key, tag, content in [
        ("a", b"one", b"i"),
        ("b", b"one", b"j"),
        ("c", b"two", b"i"),
        ("d", None, None),
    ]:
        commit(manager, key, tag, content).release()
    yield manager
    manager.close()


def commit(
    manager: MultimodalEmbeddingCacheManager,
    key: str,
    tag: bytes | None,
    content: bytes | None = None,
    *,
    retain: bool = True,
) -> Lease:
    reservation = manager.reserve(key, NBYTES, owner="test", tag=tag, content=content)
    reservation.view.fill_(ord(key))
    return reservation.commit(dtype=torch.uint8, shape=(NBYTES,), retain=retain)


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (Selection(key="a"), ["b", "c", "d"]),
        (Selection(key="z"), ["a", "b", "c", "d"]),
        (Selection(tag=b"one"), ["c", "d"]),
        (Selection(tag=b"none"), ["a", "b", "c", "d"]),
        (Selection(content=b"i"), ["b", "d"]),
        (Selection(content=b"none"), ["a", "b", "c", "d"]),
        (Selection(), []),
    ],
)
def test_what_is_selected_goes_and_nothing_else(
    manager: MultimodalEmbeddingCacheManager, selection: Selection, left: list[str]
) -> None:
    gone = 4 - len(left)
    before = manager.keys()
    dropped = manager.drop_selected(selection)
    assert sorted(dropped.keys) == sorted(set(before) - set(left))
    assert (dropped.entries, dropped.nbytes) == (gone, gone * NBYTES)
    assert manager.keys() == left
    statistics = manager.statistics()
    assert (statistics.dropped, statistics.dropped_bytes) == (gone, gone * NBYTES)
    assert statistics.evictions == 0
    assert statistics.arena.used_bytes == len(left) * NBYTES


def test_a_dropped_entry_stays_true_for_its_holder_and_is_freed_with_it(
    manager: MultimodalEmbeddingCacheManager,
) -> None:
    lease = manager.lease("a")
    assert lease is not None
    manager.drop_selected(Selection())
    assert manager.lease("a") is None
    commit(manager, "a", None)
    assert lease.tensor.eq(ord("a")).all()
    assert manager.statistics().withdrawn_bytes == NBYTES
    lease.release()
    assert manager.statistics().withdrawn_bytes == 0


def test_what_is_committed_without_being_retained_is_never_found(
    manager: MultimodalEmbeddingCacheManager,
) -> None:
    known = manager.lease("a")
    lease = commit(manager, "a", None, retain=False)
    with commit(manager, "e", None, retain=False) as other:
        assert manager.lease("e") is None
        assert other.tensor.eq(ord("e")).all()
    found = manager.lease("a")
    assert known is not None
    assert found is not None
    assert found.address == known.address != lease.address, "the entry under the key was replaced"
    assert manager.statistics().withdrawn_bytes == NBYTES
    lease.release()
    assert manager.statistics().arena.used_bytes == 4 * NBYTES
