"""Drops that concern items under way: a drop must also catch what is not in the cache yet.

An item that is being fetched, encoded or READ when the drop comes would be committed after it. So everything
that may end in a commit holds a `DropWatch`; a drop marks those it concerns, and what is marked is served but
not retained. The marks are looked at in the turn of the event loop in which the commit is made, and drops are
made on the same loop: nothing slips between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from trtllm_mm_cache.cache.scope import Selection


class DropWatch:
    """The drops that came while one item was under way.

    Its `tag` is known from the start, its key and the digest of its `content` later.
    """

    __slots__ = ("__weakref__", "_drops", "content", "tag")

    def __init__(self, tag: bytes | None) -> None:
        self.tag = tag
        self.content: bytes | None = None
        self._drops: list[Selection] = []

    def note(self, selection: Selection) -> None:
        """Remember a drop that came meanwhile."""
        self._drops.append(selection)

    def dropped(self, key: str) -> bool:
        """Whether a drop since the beginning concerns this item, whose key is `key`."""
        return any(self.concerned_by(selection, key) for selection in self._drops)

    def concerned_by(self, selection: Selection, key: str) -> bool:
        """Whether this item, whose key is `key`, is selected."""
        return selection.matches(key, self.tag, self.content)


class Drops:
    """The watches of one worker. For use from one event loop.

    A watch counts as long as it is referenced, so a flight may take over that of the request that began it.
    """

    def __init__(self) -> None:
        self._watches: WeakSet[DropWatch] = WeakSet()
        self._barred: dict[Selection, asyncio.TimerHandle] = {}
        self._loads: dict[asyncio.Future[None], tuple[str, DropWatch]] = {}

    def watch(self, tag: bytes | None) -> DropWatch:
        """Return the watch of one item, before anything is looked up for it."""
        watch = DropWatch(tag)
        for selection in self._barred:
            watch.note(selection)
        self._watches.add(watch)
        return watch

    def bar(self, selection: Selection, *, seconds: float) -> None:
        """Retain nothing of what is selected until `unbar`, or for as long as this.

        While several workers drop, one that has dropped could else get it back from one that has not yet, by
        way of what they share.
        """
        self.unbar(selection)
        loop = asyncio.get_running_loop()
        self._barred[selection] = loop.call_later(seconds, self._barred.pop, selection, None)

    def unbar(self, selection: Selection) -> None:
        """Retain it again, of items that come from now on."""
        if (timer := self._barred.pop(selection, None)) is not None:
            timer.cancel()

    @contextmanager
    def loading(self, key: str, watch: DropWatch) -> Iterator[None]:
        """Name a block in which tiers may be asked to retain something for the item of `watch`."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loads[ended] = (key, watch)
        try:
            yield
        finally:
            del self._loads[ended]
            ended.set_result(None)

    def drop(self, selection: Selection) -> None:
        """Mark everything under way that may be selected."""
        for watch in self._watches:
            watch.note(selection)

    async def ended(self, selection: Selection, *, deadline_s: float) -> int:
        """Wait until the loads of what is selected have ended; return how many have not by the deadline."""
        loads = [ended for ended, (key, watch) in self._loads.items() if watch.concerned_by(selection, key)]
        if not loads:
            return 0
        _, pending = await asyncio.wait(loads, timeout=deadline_s)
        return len(pending)
