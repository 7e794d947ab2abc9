"""A stage for single flight: a load that waits at a gate, its callers, and values that count their owners."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from trtllm_mm_cache.cache.flight import SingleFlight


class Share:
    """Counts its owners, as a lease does."""

    def __init__(self, owners: Owners, serial: int) -> None:
        self.owners = owners
        self.serial = serial
        self.discarded = False
        owners.alive += 1
        owners.made += 1

    def share(self) -> Share:
        assert not self.discarded
        return Share(self.owners, self.serial)

    def discard(self) -> None:
        assert not self.discarded, "discarded twice"
        self.discarded = True
        self.owners.alive -= 1


@dataclass
class Owners:
    alive: int = 0
    made: int = 0


@dataclass
class Stage:
    """A flight whose load waits at a gate, and the callers that wait for it."""

    flights: SingleFlight[Share] = field(
        default_factory=lambda: SingleFlight(share=Share.share, discard=Share.discard)
    )
    owners: Owners = field(default_factory=Owners)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None
    loads: int = 0
    ended: list[str] = field(default_factory=list)
    callers: list[asyncio.Task[tuple[Share, bool]]] = field(default_factory=list)

    async def load(self) -> Share:
        self.loads += 1
        serial = self.loads
        try:
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("returned")
        return Share(self.owners, serial)

    def call(self, key: str = "key") -> asyncio.Task[tuple[Share, bool]]:
        caller = asyncio.create_task(self.flights.run(key, self.load))
        self.callers.append(caller)
        return caller

    async def outcomes(self) -> list[str]:
        """Wait for every caller, at most 5 seconds; name what each got; discard its share."""
        await asyncio.wait(self.callers, timeout=5)
        names = []
        for caller in self.callers:
            assert caller.done(), "a caller hangs"
            if caller.cancelled():
                names.append("cancelled")
            elif (error := caller.exception()) is not None:
                names.append(type(error).__name__)
            else:
                share, joined = caller.result()
                share.discard()
                names.append(("joined" if joined else "led") + f" {share.serial}")
        return names


async def turns(count: int = 5) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
