"""One missing embedding on its way through the engine's own tower into the cache.

    open ──marked──▶ checking ──right──▶ done: committed, those who wait have leases
     │                  └───────wrong──▶ refused ──released──▶ done: abandoned
     └──released, not marked──▶ done: abandoned, one of those who wait tries again

The engine marks it when the tower's output lies in the extent. That is looked at twice: when the first token
has come, before which the tower must have run if it ran; and when the last holder has released it, after
which the engine does nothing for it any more. Only then is an extent freed that was not marked: vLLM may have
answered from its own caches, and would still encode the image if it preempted the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from trtllm_mm_cache.cache.arena.marks import Mark
from trtllm_mm_cache.cache.manager import Lease, Reservation
from trtllm_mm_cache.engines.own_tower import Fill, MissingEmbedding, PreparedItem
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.claims import Claim

State = Literal["open", "checking", "refused", "done"]


@dataclass(frozen=True, eq=False)
class Extent:
    """What an embedding is to be filled into: reserved, with a mark, and a claim for those who wait."""

    reservation: Reservation
    mark: Mark
    claim: Claim

    def fill(self, prepared: PreparedItem) -> Fill:
        """Return what the engine is told."""
        shape = prepared.shape
        target = self.reservation.handle(shape.dtype, (shape.rows, shape.width))
        return Fill(target, self.mark.handle, self.mark.nonce)


class Filling:
    """What the holders of one missing embedding share. `extent` is None where it is not kept.

    `undertaking` is left when all is over. `check` is called once, on the event loop, with a marked extent.
    The holders are counted by any thread; the last release is the event loop's.
    """

    def __init__(
        self,
        item: MissingItem,
        prepared: PreparedItem,
        extent: Extent | None,
        undertaking: ExitStack,
        check: Callable[[Filling], None],
    ) -> None:
        self.item = item
        self.prepared = prepared
        self.extent = extent
        self.state: State = "open"
        self._undertaking = undertaking
        self._check = check
        self._fill = None if extent is None else extent.fill(prepared)
        self._holders = 0
        self._guard = threading.Lock()

    @property
    def filled(self) -> bool:
        """Whether the engine has marked it."""
        return self.extent is not None and self.extent.mark.checksum() is not None

    def hold(self) -> HeldFilling:
        """Return one more holder."""
        with self._guard:
            self._holders += 1
        return HeldFilling(self, self.prepared, self._fill)

    def first_token(self) -> None:
        """The engine has made the first token. Only the first call counts."""
        if self.state != "open" or self.extent is None:
            return
        if self.filled:
            self._start_check()
        else:
            self.extent.claim.leave("alone")

    def release(self) -> None:
        """One holder is done with it."""
        with self._guard:
            self._holders -= 1
            held = self._holders > 0
        if held:
            return
        if self.state == "open" and self.filled:
            self._start_check()
        elif self.state != "checking":
            self._abandon()

    def committed(self, lease: Lease) -> None:
        """The check has made an entry of it; `lease` stays the caller's."""
        assert self.extent is not None  # noqa: S101 - else nothing is checked
        self.extent.claim.land(lease)
        self.extent.mark.close()
        self._end()

    def refused(self) -> None:
        """The check has found it wrong: it goes with its last holder."""
        assert self.extent is not None  # noqa: S101 - else nothing is checked
        self.state = "refused"
        self.extent.claim.leave("alone")
        if self._holders == 0:
            self._abandon()

    def _start_check(self) -> None:
        self.state = "checking"
        self._check(self)

    def _abandon(self) -> None:
        if self.state == "done":
            return
        if self.extent is not None:
            self.extent.reservation.abandon()
            self.extent.mark.close()
            self.extent.claim.leave("again")
        self._end()

    def _end(self) -> None:
        self.state = "done"
        self._undertaking.close()


class HeldFilling(MissingEmbedding):
    """One holder of a `Filling`: stands among a request's leases."""

    def __init__(self, filling: Filling, prepared: PreparedItem, fill: Fill | None) -> None:
        super().__init__(filling.item.key.hex, prepared, fill)
        self._filling = filling
        self._released = False

    @property
    def filled(self) -> bool:
        """See `MissingEmbedding.filled`."""
        return self._filling.filled

    def first_token(self) -> None:
        """The engine has made the first token: what it was to fill lies there by now, or it had its own."""
        self._filling.first_token()

    def clone(self) -> HeldFilling:
        """See `MissingEmbedding.clone`."""
        return self._filling.hold()

    def release(self) -> None:
        """See `MissingEmbedding.release`."""
        if not self._released:
            self._released = True
            self._filling.release()
