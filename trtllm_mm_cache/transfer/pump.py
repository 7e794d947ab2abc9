"""The thread that owns the NIXL agent: it runs commands from a queue and polls in between.

NIXL's own progress thread is off (it burns a core), so this thread is the progress: the side that is read
from must keep polling or READs hang. It also makes the calls that copy (a READ over CMA copies inside
`transfer()`, with the GIL released), which therefore never run on the event loop.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from trtllm_mm_cache.errors import ConfigurationError, MmCacheError, TransferError
from trtllm_mm_cache.transfer.environment import NixlLibrary, load_nixl, uses_shared_memory_alone

logger = logging.getLogger(__name__)

# One poll costs about 10 us of CPU, so 1 ms is 1.4 % of a core. A READ completes only after the exporter has
# polled: 100 us (6 % of a core) while bytes are expected saves 0.8 ms on a 1 MB READ.
IDLE_POLL_S = 0.001
HURRIED_POLL_S = 0.0001

_EXIT_DEADLINE_S = 2.0


class Side(Protocol):
    """The exporter or the reader of a process. The agent thread calls every method; each is brief."""

    def poll(self, nixl: Any) -> float:
        """Do what is due; return after how many seconds to come back, `IDLE_POLL_S` if nothing is near."""
        ...

    def on_notification(self, sender: str, message: bytes) -> None:
        """Take note that the NIXL agent named `sender` has sent `message`."""
        ...

    def is_busy(self) -> bool:
        """Whether something is under way that an orderly end should wait for."""
        ...

    def on_closing(self) -> None:
        """Prepare for the agent's destruction, or prevent it by another reference to one of its handles."""
        ...

    def on_closed(self) -> None:
        """NIXL is not called any more: answer those that still wait."""
        ...


class AgentThread:
    """Runs commands with the NIXL agent and drives the attached sides. Public methods are thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started: Future[NixlLibrary] = Future()
        self.ended: Future[None] = Future()
        self._nixl: Any = None
        # No SimpleQueue: CPython's (seen in 3.11.7, by gdb) computes anew how long to wait after its first
        # look at the lock, and when that took longer than the timeout, it waits for ever.
        self._commands: queue.Queue[tuple[Future[Any], Callable[[Any], None]]] = queue.Queue()
        self._sides: tuple[Side, ...] = ()
        self._lock = threading.Lock()  # orders commands against the end
        self._end_by: float | None = None
        self._failed_polls = 0

    @property
    def is_alive(self) -> bool:
        """Whether commands are taken."""
        return self._end_by is None

    def start(self) -> None:
        """Make the NIXL agent, on the thread; `started` tells the outcome."""
        threading.Thread(target=self._run, name="nixl-agent", daemon=True).start()
        atexit.register(self._end_at_exit)

    def attach(self, side: Side) -> None:
        """Drive `side` from now on. Raises `TransferError` after the end."""
        with self._lock:
            self._refuse_after_end()
            self._sides = (*self._sides, side)

    def begin(self, settled: Future[Any], work: Callable[[Any], None]) -> None:
        """Run `work(nixl)`; `settled` stays open until the work, or what it began, completes it.

        Cancelling `settled` before the work starts means that it never does; afterwards it has no effect.
        An exception of the work goes into `settled`. Raises `TransferError` after the end.
        """
        with self._lock:
            self._refuse_after_end()
            self._commands.put((settled, work))

    def end(self, *, deadline_s: float) -> None:
        """Take nothing new, and end when nothing is under way or after `deadline_s`; `ended` tells when."""
        with self._lock:
            if self._end_by is None:
                self._end_by = time.monotonic() + deadline_s

    # On the thread.

    def _run(self) -> None:
        self.started.set_running_or_notify_cancel()  # from here on a cancelled starter changes nothing
        try:
            library = load_nixl()
            self._nixl = _create_agent(library, self.name)
        except BaseException as error:  # noqa: BLE001 (the starter's future carries it)
            self._finish()
            self.started.set_exception(error)
            return
        self.started.set_result(library)
        try:
            self._serve(library)
        except Exception:
            logger.exception("the NIXL agent thread failed: this process cannot transfer embeddings any more")
        finally:
            self._finish()

    def _serve(self, library: NixlLibrary) -> None:
        pace = IDLE_POLL_S
        while not self._may_end():
            self._run_one_command(pace)
            self._deliver_notifications(library)
            pace = min((side.poll(self._nixl) for side in self._sides), default=IDLE_POLL_S)

    def _run_one_command(self, timeout_s: float) -> None:
        try:
            settled, work = self._commands.get(timeout=timeout_s)
        except queue.Empty:
            return
        if not settled.set_running_or_notify_cancel():
            return
        try:
            work(self._nixl)
        except MmCacheError as error:
            # The tracebacks lead to this thread's frames, and those to the future that carries the error: a
            # cycle would keep what the caller's frames hold, until the garbage collector runs.
            for each in (error, error.__cause__, error.__context__):
                if each is not None:
                    each.__traceback__ = None
            settled.set_exception(error)
        except BaseException as error:  # noqa: BLE001 (the caller's future carries it)
            settled.set_exception(error)

    def _deliver_notifications(self, library: NixlLibrary) -> None:
        try:
            notifications = self._nixl.get_new_notifs()
        except library.errors:
            # Whatever it is, it must neither end the thread nor fill the log a thousand times a second.
            self._failed_polls += 1
            if self._failed_polls.bit_count() == 1:
                logger.exception(
                    "NIXL failed to poll for notifications (%d times so far)", self._failed_polls
                )
            return
        for sender, messages in notifications.items():
            for message in messages:
                for side in self._sides:
                    side.on_notification(sender, message)

    def _may_end(self) -> bool:
        if self._end_by is None:
            return False
        if time.monotonic() >= self._end_by:
            return True
        return self._commands.empty() and not any(side.is_busy() for side in self._sides)

    def _finish(self) -> None:
        self.end(deadline_s=0)
        atexit.unregister(self._end_at_exit)
        for side in self._sides:
            side.on_closing()
        self._nixl = None
        while not self._commands.empty():
            settled, _ = self._commands.get()
            if settled.set_running_or_notify_cancel():
                settled.set_exception(TransferError("the NIXL agent was closed before it came to this"))
        for side in self._sides:
            side.on_closed()
        self.ended.set_result(None)

    # On any thread.

    def _refuse_after_end(self) -> None:
        if self._end_by is not None:
            raise TransferError("the NIXL agent of this process is closed; transfers are over")

    def _end_at_exit(self) -> None:
        """End before the interpreter goes: a thread inside NIXL would then abort the process."""
        self.end(deadline_s=0)
        try:
            self.ended.result(timeout=_EXIT_DEADLINE_S)
        except TimeoutError:
            logger.warning("the NIXL agent did not end in time at exit")


def _create_agent(library: NixlLibrary, name: str) -> Any:
    module = library.module
    config = module.nixl_agent_config(
        enable_prog_thread=False,
        backends=[],
        # Without it NIXL called from several threads was seen to crash. One thread calls it here; the
        # uncontended lock costs nothing to speak of.
        sync_mode=module.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    failures: tuple[type[Exception], ...] = (*library.errors, RuntimeError)
    try:
        agent = module.nixl_agent(name, config)
        # `peer`: the death of a peer is an error of the READ, not a hang. Shared memory does not know that
        # mode, and does not need it: the kernel reports the same.
        mode = "none" if uses_shared_memory_alone() else "peer"
        agent.create_backend("UCX", {"ucx_error_handling_mode": mode})
    except failures as error:
        raise ConfigurationError(
            f"NIXL's UCX backend does not start: {error}; check the UCX_* settings"
        ) from error
    return agent
