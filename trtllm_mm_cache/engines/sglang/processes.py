"""SGLang's `Engine` inside this process: its start, its end, and the end of its processes.

Left alone SGLang would take this process over: handlers for SIGTERM and SIGQUIT, a watchdog that kills the
whole process tree when a scheduler ends, and at its shutdown every child of this process. So:

- it is started in a thread of its own, where it installs no handlers; the thread stays, since the kernel ends
  the schedulers together with the thread that started them;
- its watchdog is stopped. `RunningEngine.lost` waits for the processes instead;
- a scheduler that fails sends this process SIGQUIT, which is ignored: the scheduler's end is seen anyway;
- at the end the processes that it started are killed, and no others;
- its file of the scheduler's load in /dev/shm, which nobody here reads and SGLang never removes, goes as soon
  as the scheduler has it open, so a killed worker leaves none. Its sockets' files in the temporary folder go
  at the end: connections may still be made while it runs. Those of a killed worker the next one removes.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import logging
import signal
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trtllm_mm_cache.engines.left_files import files_made, remove_files, write_down
from trtllm_mm_cache.engines.sglang.engine_input import EngineInputs
from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
from trtllm_mm_cache.engines.sglang.support import (
    LANGUAGE_PART,
    device_of,
    engine_arguments,
    import_sglang,
    run_language_part_alone,
)
from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

_LOOK_S = 0.25
_END_S = 10.0


class RunningEngine:
    """A started engine. `manager` is SGLang's `TokenizerManager`, for use from one event loop."""

    def __init__(self, model_path: Path, model_type: str, args: SglangEngineArgs) -> None:
        """Start it. Blocking: half a minute and more. Raises `ConfigurationError` when SGLang refuses."""
        module = import_sglang(device_of(args))
        if model_type in LANGUAGE_PART:
            run_language_part_alone()
        _ignore_sigquit()
        before, files_before = set(_children()), files_made()
        self._starter = ThreadPoolExecutor(1, "sglang-start")
        self._processes: list[psutil.Process] = []
        try:
            engine = self._starter.submit(_start, module, engine_arguments(model_path, args)).result()
        except (Exception, SystemExit) as error:
            _kill([process for process in _children() if process not in before])
            self._starter.shutdown(wait=False)
            raise ConfigurationError(f"SGLang could not load the model: {error}") from error
        self.files = files_made() - files_before
        """By which SGLang's processes find each other."""
        write_down(self.files)
        self.manager: Any = engine.tokenizer_manager
        self.inputs = EngineInputs(self.manager.mm_processor)
        self.manager.mm_processor = self.inputs
        self.when_lost: set[Callable[[], None]] = set()
        """Called once, from the event loop's thread, when SGLang has ended by itself."""
        self._engine = engine
        self._processes = [psutil.Process(pid) for pid in engine.get_all_child_pids()]
        self._lost = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """See to it that `lost` and `when_lost` work. From the event loop."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="sglang's processes")

    async def lost(self) -> None:
        """Return when one of SGLang's processes has ended, or the task that takes their answers."""
        self.watch()
        await self._lost.wait()

    @property
    def context(self) -> int:
        """Most tokens of a prompt with its answer: SGLang keeps a few of its KV cache free."""
        return int(self._engine._scheduler_init_result.scheduler_infos[0]["max_req_input_len"])

    @property
    def is_lost(self) -> bool:
        """Whether `lost` would return at once."""
        return self._lost.is_set()

    async def generate(self, name: str, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Return SGLang's own stream of outputs of one answer."""
        stream: AsyncGenerator[dict[str, Any]] = await self._engine.async_generate(**arguments, rid=name)
        return stream

    async def _watch(self) -> None:
        while all(_runs(process) for process in self._processes) and not self.manager.has_failed():  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        self._lost.set()
        for lost in tuple(self.when_lost):
            lost()

    async def stop(self) -> None:
        """Take no more answers. From the event loop; before `close`."""
        if self._watching is not None:
            self._watching.cancel()
        await self.manager.stop()

    def close(self) -> None:
        """Kill SGLang's processes and free its threads. Blocking, at most ten seconds."""
        _kill(self._processes)
        self._engine.send_to_rpc.context.destroy(linger=0)
        remove_files(self.files)
        self._engine.loop.close()  # made in the thread that started it, and never run
        self.inputs.shutdown()
        self._starter.shutdown(wait=False)


def _start(module: Any, arguments: dict[str, Any]) -> Any:
    from trtllm_mm_cache.engines.sglang.manager import QuietTokenizerManager

    class Engine(module.Engine):  # type: ignore[misc]
        init_tokenizer_manager_func = staticmethod(
            partial(module.init_tokenizer_manager, TokenizerManagerClass=QuietTokenizerManager)
        )

        def shutdown(self) -> None:
            """Do nothing: it would end every child of this process."""

    engine = Engine(**arguments)
    atexit.unregister(engine.shutdown)
    engine.tokenizer_manager._subprocess_watchdog.stop()
    Path(engine.tokenizer_manager.load_snapshot_reader.path).unlink(missing_ok=True)
    return engine


def _ignore_sigquit() -> None:
    """Ignore SIGQUIT, from whichever thread: Python's own `signal` works in the main thread alone."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGQUIT, ctypes.c_void_p(1))


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=_END_S)
    if alive:
        logger.warning("%d of SGLang's processes have not ended within %g s", len(alive), _END_S)
