"""The stack: its services are started, kept up and ended."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.serve.child import Children
from trtllm_mm_cache.serve.folder import RunFolder
from trtllm_mm_cache.serve.service import Kind, Life, Service, Spec
from trtllm_mm_cache.serve.warm import WarmStart
from trtllm_mm_cache.settings import ServeSettings

_PROGRESS_S = 5.0
_TERMINATED_S = 1.0


class StackError(MmCacheError):
    """A process without which nothing is served could not be kept up."""

    code = "stack_failed"


@dataclass(frozen=True)
class Surroundings:
    """What the processes of a stack have in common: their folder, environment and parent."""

    folder: RunFolder
    environment: Mapping[str, str]
    children: Children
    warm: WarmStart | None


class Stack:
    """The processes of `specs`. One event loop; `start`, `keep_up` and `drain` in this order."""

    def __init__(self, specs: Sequence[Spec], around: Surroundings, settings: ServeSettings) -> None:
        self._around = around
        self._settings = settings
        self._services = [
            Service(spec, around.folder.log(spec.name), around.children, around.warm) for spec in specs
        ]

    async def start(self) -> None:
        """Start everything and return when it is ready. Raises `StackError` when something ends before."""
        await self._for_each(self._bring_up, waiting_for=True)

    async def keep_up(self) -> None:
        """Start again what ends by itself. Raises `StackError` when without it nothing is served."""
        await self._for_each(self._keep_up)
        await asyncio.get_running_loop().create_future()  # all that is left was given up, and is not needed

    async def drain(self) -> bool:
        """End everything, in the order of a request; return whether nothing was cut off."""
        clean = True
        for kind in Kind:
            drained = [self._drain(each) for each in self._services if each.spec.kind is kind]
            clean &= all(await asyncio.gather(*drained))
        if self._around.warm is not None:
            await self._around.warm.close()
        await self._around.children.kill_orphans()
        return clean

    def kill(self) -> None:
        """End everything at once, while `drain` runs."""
        for service in self._services:
            if service.life is not None:
                service.life.child.signal(service.spec.end_signal)

    async def _for_each(
        self, work: Callable[[Service], Coroutine[Any, Any, None]], *, waiting_for: bool = False
    ) -> None:
        """Do `work` for all services at the same time; the first error cancels the rest."""
        tasks = {asyncio.create_task(work(service)): service for service in self._services}
        began, pending = asyncio.get_running_loop().time(), set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending,
                    timeout=_PROGRESS_S if waiting_for else None,
                    return_when=asyncio.FIRST_EXCEPTION,
                )
                for task in done:
                    task.result()
                if pending and waiting_for:
                    names = ", ".join(str(tasks[task]) for task in tasks if task in pending)
                    say(f"waiting for {names} ({asyncio.get_running_loop().time() - began:.0f} s)")
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _bring_up(self, service: Service) -> None:
        life = await self._start(service)
        if not life.serves:
            show(service)
            raise StackError(f"{service} {life.end_text()} before it was ready")
        say(f"{service} is ready")

    async def _start(self, service: Service) -> Life:
        """Start it; return when it serves or has ended. What takes too long is killed."""
        life = await service.start(self._around.environment)
        self._around.folder.record(
            [
                (str(each), str(each.life.child.pid), str(each.port), str(each.log))
                for each in self._services
                if each.life is not None
            ]
        )
        say(
            f"started {service} (pid {life.child.pid}, metrics on 127.0.0.1:{service.port}/metrics, "
            f"log: {service.log})"
        )
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                await life.wait_ready()
        except TimeoutError:
            say(f"{service} was not ready after {self._settings.ready_timeout_s:.0f} s")
            await self._end(service, life)
        return life

    async def _keep_up(self, service: Service) -> None:
        """Start it again whenever it ends: at once, and ever later where it does not serve for long."""
        loop, settings = asyncio.get_running_loop(), self._settings
        life, since, early, failed = service.life, loop.time(), 0, 0
        while life is not None:
            served = life.serves
            await life.child.wait()
            failed = 0 if served else failed + 1
            early = 0 if served and loop.time() - since >= settings.settled_s else early + 1
            if settings.no_restart or failed == settings.restart_attempts:
                self._give_up(service, life)
                return
            delay = min(2.0 ** (early - 2), settings.restart_most_s) if early > 1 else 0.0
            when = f"in {delay:.0f} s" if delay else "now"
            say(f"{service} {life.end_text()}; it is started again {when}. {self._meanwhile(service)}")
            if failed == 1:  # the others are like it
                show(service)
            await asyncio.sleep(delay)
            since = loop.time()
            life = await self._start(service)
            if life.serves:
                say(f"{service} is ready again, {loop.time() - since:.1f} s after its start")
                since = loop.time()

    def _give_up(self, service: Service, life: Life) -> None:
        """Go on without it. Raises `StackError` when nothing is served without it."""
        if self._needs(service):
            show(service)
            raise StackError(f"{service} {life.end_text()}")
        say(
            f"warning: {service} {life.end_text()} and is not started again. {self._meanwhile(service)} "
            f"(log: {service.log})"
        )

    def _needs(self, service: Service) -> bool:
        kind = service.spec.kind
        return kind is Kind.FRONTEND or (kind is Kind.PD and not self._others(service))

    def _others(self, service: Service) -> int:
        """How many other services of its kind serve."""
        return sum(
            each.serves
            for each in self._services
            if each.spec.kind is service.spec.kind and each is not service
        )

    def _meanwhile(self, service: Service) -> str:
        """Say what is served without it."""
        kind, others = service.spec.kind, self._others(service)
        if kind is Kind.FRONTEND:
            return "Nothing is served without it"
        if others:
            return f"The other {kind.value}s go on"
        if kind is Kind.PD:
            return "Requests are answered 503 without it"
        return "Text and cached images are still served"

    async def _drain(self, service: Service) -> bool:
        """Tell it to finish and wait until it has ended; return whether it did so by itself."""
        life = service.life
        if life is None or not life.child.runs:
            return True
        served = life.serves
        life.child.signal(service.spec.drain_signal)
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                status = await life.child.wait()
        except TimeoutError:
            say(f"{service} did not end in {self._settings.drain_timeout_s:g} s and is killed")
            await self._end(service, life)
            return False
        return status == 0 or not served

    async def _end(self, service: Service, life: Life) -> None:
        """End it: mpirun must be told, and kills its ranks then; what does not listen is killed."""
        life.child.signal(service.spec.end_signal)
        try:
            async with asyncio.timeout(_TERMINATED_S):
                await life.child.wait()
        except TimeoutError:
            life.child.kill()
            await life.child.wait()


def say(text: str) -> None:
    """Print a line for who has started this."""
    print(f"[launch] {text}", flush=True)


def show(service: Service) -> None:
    """Print the end of a log."""
    text = "\n".join(service.tail()) or "(it is empty)"
    print(
        f"[launch] ---- last lines of {service.log} ----\n{text}\n[launch] ----", file=sys.stderr, flush=True
    )
