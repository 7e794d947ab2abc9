"""What a tier is offered and when it is stored: behind the commit, never in a request's way.

An embedding is stored at its `at_use`-th use: most images are seen once, and storing those would cost more
than it ever brings. What a tier holds is touched now and then while it is used, so that what the arena serves
is not the first to leave the disk. An offer holds a lease until it is stored; offers that wait are bounded in
number and bytes, and what finds the queue full is dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.tiers.format import EntryName
from trtllm_mm_cache.tiers.limits import TierLimits

logger = logging.getLogger(__name__)

Outcome = Literal["stored", "present", "elsewhere", "unfit", "failed", "full", "dropped"]
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "stored", "present", "elsewhere", "unfit", "failed", "full", "dropped",
)  # fmt: skip
"""Of an offer: stored; there already, and touched; another process writes; its header does not fit;
the storage failed; the queue was full; a drop concerned it."""

_TOUCH_S = 60.0
_TIDY_S = 60.0
_MOST_KEYS = 65_536
_MOST_WAITING = 64
_CLOSE_S = 2.0


@dataclass(eq=False, slots=True)
class Offer:
    """One embedding on its way into a tier; `dropped` says that it must not be there in the end."""

    name: EntryName
    kind: str
    content: bytes | None
    lease: Lease
    dropped: bool = False


@dataclass(frozen=True)
class Sink:
    """Where offers go. `put` stores one and says how that ended, `undo` removes what it stored; both block.

    `tidy` is called now and then.
    """

    put: Callable[[Offer], Outcome]
    undo: Callable[[EntryName], None]
    tidy: Callable[[], None]


class Offers:
    """The offers of one tier, stored in `sink` by one thread, which tidies up every minute. Thread-safe.

    `limits.waiting_bytes` bounds what waits, but for one offer of any size. `outcomes` counts since the
    start, `errors` what tidying up raised.
    """

    def __init__(
        self, name: str, sink: Sink, limits: TierLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sink = sink
        self._limits = limits
        self._clock = clock
        self._changed = threading.Condition()
        self._uses: OrderedDict[str, int] = OrderedDict()
        self._held: OrderedDict[str, float] = OrderedDict()
        self._waiting: OrderedDict[str, Offer] = OrderedDict()
        self._running: Offer | None = None
        self._closed = False
        self.outcomes: Counter[Outcome] = Counter()
        self.errors = 0
        self._name = name
        self._thread = threading.Thread(target=self._work, name=f"tier-{name}-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> tuple[int, int]:
        """How many offers wait or are being stored, and their bytes."""
        with self._changed:
            return len(self._offers()), self._nbytes()

    def used(self, name: EntryName, kind: str, content: bytes | None, lease: Lease) -> None:
        """Count a use of an embedding; take it up if it is time. The lease stays the caller's."""
        with self._changed:
            if self._closed or not self._is_due(name.key) or name.key in self._waiting:
                return
            offers = self._offers()
            if len(offers) >= _MOST_WAITING or (
                offers and self._nbytes() + lease.nbytes > self._limits.waiting_bytes
            ):
                self.outcomes["full"] += 1
                return
            self._remember(self._held, name.key, self._clock())
            self._waiting[name.key] = Offer(name, kind, content, lease.clone())
            self._changed.notify_all()

    def holds(self, key: str) -> None:
        """Note that the tier has just brought `key`: it is not offered back."""
        with self._changed:
            self._remember(self._held, key, self._clock())

    def lacks(self, key: str) -> None:
        """Note that the tier has lost `key`."""
        with self._changed:
            self._held.pop(key, None)

    def drop(self, selection: Selection) -> list[Offer]:
        """Have nothing stored of what is selected; return what is being stored, and will be removed."""
        with self._changed:
            for known in (self._uses, self._held):
                if selection.key is None:
                    known.clear()
                else:
                    known.pop(selection.key, None)
            concerned = [each for each in self._offers() if _concerns(selection, each)]
            for offer in concerned:
                offer.dropped = True
            return [offer for offer in concerned if offer is self._running]

    def wait_ended(self, offers: list[Offer], deadline_s: float) -> bool:
        """Wait until none of `offers` is being stored; False if one is past the deadline. Blocking."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running not in offers, deadline_s)

    def close(self) -> None:
        """Release what waits, and wait a moment for what is being stored."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = list(self._waiting.values()), OrderedDict()
            self._changed.notify_all()
        for offer in waiting:
            offer.lease.release()
        self._thread.join(_CLOSE_S)

    def _is_due(self, key: str) -> bool:
        touched = self._held.get(key)
        if touched is not None:
            return self._clock() - touched >= _TOUCH_S
        uses = self._uses.pop(key, 0) + 1
        if uses >= self._limits.at_use:
            return True
        self._remember(self._uses, key, uses)
        return False

    @staticmethod
    def _remember(known: OrderedDict[str, float] | OrderedDict[str, int], key: str, value: float) -> None:
        known[key] = value  # type: ignore[assignment]
        known.move_to_end(key)
        if len(known) > _MOST_KEYS:
            known.popitem(last=False)

    def _offers(self) -> list[Offer]:
        return [*self._waiting.values(), *([self._running] if self._running else ())]

    def _nbytes(self) -> int:
        return sum(offer.lease.nbytes for offer in self._offers())

    def _work(self) -> None:
        due = 0.0
        while True:
            if (now := self._clock()) >= due:
                self._tidied()
                due = now + _TIDY_S
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed, max(0.0, due - self._clock()))
                if self._closed:
                    return
                if not self._waiting:
                    continue
                _, offer = self._waiting.popitem(last=False)
                self._running = offer
            self._store(offer)
            del offer

    def _store(self, offer: Offer) -> None:
        outcome: Outcome = "dropped"
        try:
            if not offer.dropped:
                outcome = self._sink.put(offer)
        except MmCacheError as error:
            outcome = "failed"
            logger.warning(
                "tier %s: embedding %s… not stored: %s", self._name, offer.name.key[:12], error.message
            )
        except Exception:
            outcome = "failed"
            logger.exception("tier %s: embedding %s… not stored", self._name, offer.name.key[:12])
        finally:
            offer.lease.release()
        self._end(offer, outcome)

    def _end(self, offer: Offer, outcome: Outcome) -> None:
        """Count how it ended; what a drop concerned meanwhile is removed before the drop is told."""
        with self._changed:
            undo = offer.dropped and outcome in ("stored", "present")
            if not undo:
                self._finished(offer, outcome)
                return
        try:
            self._sink.undo(offer.name)
            outcome = "dropped"
        except MmCacheError as error:
            outcome = "failed"
            logger.warning("tier %s: a dropped embedding was not removed: %s", self._name, error.message)
        with self._changed:
            self._finished(offer, outcome)

    def _finished(self, offer: Offer, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        if outcome == "dropped":
            self._held.pop(offer.name.key, None)  # else it is tried again when a touch is due
        self._running = None
        self._changed.notify_all()

    def _tidied(self) -> None:
        try:
            self._sink.tidy()
        except MmCacheError as error:
            self.errors += 1
            logger.warning("tier %s: %s", self._name, error.message)
        except Exception:
            self.errors += 1
            logger.exception("tier %s: housekeeping failed", self._name)


def _concerns(selection: Selection, offer: Offer) -> bool:
    return selection.matches(offer.name.key, offer.name.tag, offer.content)
