"""SGLang's tokenizer manager, without its hold on the process. Imports SGLang."""

from __future__ import annotations

import asyncio

from sglang.srt.managers.tokenizer_manager import TokenizerManager


class QuietTokenizerManager(TokenizerManager):  # type: ignore[misc]
    """Its own would replace the worker's handler of SIGTERM, and kill the process tree when it fails."""

    def auto_create_handle_loop(self) -> None:
        """Begin to take answers from the schedulers, in the event loop of the first request."""
        if not self.asyncio_tasks:
            loop = asyncio.get_running_loop()
            self.asyncio_tasks.add(loop.create_task(self.handle_loop(), name="sglang answers"))
            self.event_loop: asyncio.AbstractEventLoop | None = loop

    def has_failed(self) -> bool:
        """Whether answers have ceased to be taken."""
        return any(task.done() for task in self.asyncio_tasks)

    async def stop(self) -> None:
        """Cease to take answers, and close the sockets to SGLang's processes. From the event loop."""
        for task in self.asyncio_tasks:
            task.cancel()
        await asyncio.gather(*self.asyncio_tasks, return_exceptions=True)
        self.recv_from_detokenizer.context.destroy(linger=0)
