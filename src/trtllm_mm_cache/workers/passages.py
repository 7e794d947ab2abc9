"""Embeddings on their way through a worker, and the drops that concern them.

A drop must also catch what is not in the cache yet: an image that is being fetched, encoded or READ when
the drop comes would be committed after it. So everything that may end in a commit holds a `Passage`; a drop
marks those it concerns, and what is marked is served but not retained. The marks are looked at in the turn
of the event loop in which the commit is made, and drops are made on the same loop: nothing slips between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from trtllm_mm_cache.cache.selection import Selection


class Passage:
    """One embedding on its way. Its `tag` is known from the start, its key when the bytes are there."""

    __slots__ = ("__weakref__", "_drops", "tag")

    def __init__(self, tag: bytes | None) -> None:
        self.tag = tag
        self._drops: list[Selection] = []

    def note(self, selection: Selection) -> None:
        """Remember a drop that came meanwhile."""
        self._drops.append(selection)

    def dropped(self, key: str) -> bool:
        """Whether a drop since the beginning concerns this embedding, whose key is `key`."""
        return any(selection.matches(key, self.tag) for selection in self._drops)


class Passages:
    """The passages of one worker. For use from one event loop.

    A passage counts as long as somebody has it, so a flight may take over that of the request that began it.
    """

    def __init__(self) -> None:
        self._passages: WeakSet[Passage] = WeakSet()
        self._loads: dict[asyncio.Future[None], tuple[str, Passage]] = {}

    def begin(self, tag: bytes | None) -> Passage:
        """Return the passage of one embedding, before anything is looked up for it."""
        passage = Passage(tag)
        self._passages.add(passage)
        return passage

    @contextmanager
    def loading(self, key: str, passage: Passage) -> Iterator[None]:
        """Name a block in which other workers may be asked to retain something for `passage`."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loads[ended] = (key, passage)
        try:
            yield
        finally:
            del self._loads[ended]
            ended.set_result(None)

    def drop(self, selection: Selection) -> None:
        """Mark everything on its way that may be selected."""
        for passage in self._passages:
            passage.note(selection)

    async def ended(self, selection: Selection, *, deadline_s: float) -> int:
        """Wait until the loads of what is selected have ended; return how many have not by the deadline."""
        loads = [
            ended for ended, (key, passage) in self._loads.items() if selection.matches(key, passage.tag)
        ]
        if not loads:
            return 0
        _, pending = await asyncio.wait(loads, timeout=deadline_s)
        return len(pending)
