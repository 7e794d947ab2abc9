"""The one NIXL agent of a process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from trtllm_mm_cache.errors import ConfigurationError, TransferError, TransferTimeoutError
from trtllm_mm_cache.transfer.checksum import ChecksumThreads
from trtllm_mm_cache.transfer.environment import NixlLibrary, check_transports, prepare_environment
from trtllm_mm_cache.transfer.messages import PeerMetadata
from trtllm_mm_cache.transfer.pump import AgentThread, Side

T = TypeVar("T")

_START_DEADLINE_S = 60.0
_CALL_DEADLINE_S = 5.0


class TransferAgent:
    """One NIXL agent on a thread of its own, through which everything that touches NIXL goes.

    Make it with `start`, `register` every region, hand it to the exporter or the reader, and `close` it
    before the registered memory is unmapped. When a process forgets, the interpreter's exit ends it. Methods
    are thread-safe; the awaitable ones belong to an event loop, any one.
    """

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.checksums = ChecksumThreads()
        self._thread = AgentThread(self.name)
        self._library: NixlLibrary | None = None
        self._regions: list[tuple[int, int]] = []
        self._metadata: PeerMetadata | None = None
        self._metadata_was_read = False

    @classmethod
    async def start(cls, settings: Mapping[str, str] | None = None) -> TransferAgent:
        """Import NIXL and make the agent, about 1 s in all, on its own thread.

        `settings` are `UCX_*` and `NIXL_*` values as in `prepare_environment`.
        Raises `ConfigurationError` when NIXL cannot be imported or its UCX backend does not start.
        """
        prepare_environment(settings)
        check_transports()
        agent = cls()
        thread = agent._thread
        thread.start()
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                agent._library = await asyncio.wrap_future(thread.started)
        except TimeoutError:
            thread.end(deadline_s=0)
            raise ConfigurationError(
                f"the NIXL agent did not start within {_START_DEADLINE_S:g} s; check the UCX_* settings"
            ) from None
        except BaseException:
            thread.end(deadline_s=0)
            raise
        return agent

    @property
    def library(self) -> NixlLibrary:
        """The NIXL module in use and its exceptions."""
        if self._library is None:
            raise TransferError("the NIXL agent has not started")
        return self._library

    @property
    def is_alive(self) -> bool:
        """Whether commands are taken: True from `start` until `close`, or until the thread failed."""
        return self._thread.is_alive

    @property
    def metadata(self) -> PeerMetadata:
        """What a peer needs to READ from this process. Reading it fixes it: `register` is refused afterwards.

        Raises `ConfigurationError` when nothing is registered.
        """
        if self._metadata is None:
            raise ConfigurationError("no memory is registered with NIXL; register the arena first")
        self._metadata_was_read = True
        return self._metadata

    async def register(self, address: int, nbytes: int) -> None:
        """Register `nbytes` bytes of host memory at `address`, as source and target of READs, until `close`.

        Takes microseconds at any size. Raises `ConfigurationError` when the range is empty, overlaps a
        registered one, when peers may have the metadata already, or when NIXL refuses.
        """
        await asyncio.wrap_future(self.call(lambda nixl: self._register(nixl, address, nbytes)))

    def attach(self, side: Side) -> None:
        """Have the agent thread drive `side` from now on. Raises `TransferError` when closed."""
        self._thread.attach(side)

    def call(self, work: Callable[[Any], T]) -> Future[T]:
        """Run `work(nixl)` on the agent thread and return the future of its result.

        The future can be cancelled until the work starts. Raises `TransferError` when closed.
        """
        future: Future[T] = Future()
        self.begin(future, lambda nixl: future.set_result(work(nixl)))
        return future

    def begin(self, settled: Future[Any], work: Callable[[Any], None]) -> None:
        """As `call`, but `settled` stays open when `work` returns, to be completed later."""
        self._thread.begin(settled, work)

    async def close(self, *, deadline_s: float) -> None:
        """Take nothing new, wait at most `deadline_s` for what is under way, then end.

        Afterwards NIXL is not called any more. The extent of a READ that is still in flight then, because its
        exporter is frozen or cut off, stays in quarantine for good: unmap it, but do not use it otherwise.
        Idempotent. Raises `TransferTimeoutError` when the thread is still inside a NIXL call 5 s later.
        """
        self._thread.end(deadline_s=deadline_s)
        try:
            async with asyncio.timeout(deadline_s + _CALL_DEADLINE_S):
                await asyncio.shield(asyncio.wrap_future(self._thread.ended))
        except TimeoutError:
            raise TransferTimeoutError(
                "the NIXL agent did not end within its deadline; end the process without unmapping the arena"
            ) from None
        await asyncio.to_thread(self.checksums.close)

    def _register(self, nixl: Any, address: int, nbytes: int) -> None:
        if address <= 0 or nbytes <= 0:
            raise ConfigurationError(f"cannot register {nbytes} bytes with NIXL: the range is empty")
        if any(address < start + size and start < address + nbytes for start, size in self._regions):
            raise ConfigurationError("cannot register a range that overlaps one that NIXL has already")
        if self._metadata_was_read:
            raise ConfigurationError(
                "cannot register more memory with NIXL: peers may hold this agent's metadata and would not "
                "learn of it; register all regions at start"
            )
        try:
            nixl.register_memory([(address, nbytes, 0, "")], mem_type="DRAM", backends=["UCX"])
            metadata = nixl.get_agent_metadata()
        except self.library.errors as error:
            raise ConfigurationError(f"NIXL refuses to register {nbytes} bytes: {error}") from error
        self._regions.append((address, nbytes))
        self._metadata = PeerMetadata.of(self.name, metadata)
