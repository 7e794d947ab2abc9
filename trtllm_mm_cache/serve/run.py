"""`serve` from its first check to its last process."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from trtllm_mm_cache.cache.arena.limits import check_fits
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.serve.child import Children
from trtllm_mm_cache.serve.folder import DISCOVERY_VARIABLE, SECRET_VARIABLE, RunFolder
from trtllm_mm_cache.serve.hints import hints
from trtllm_mm_cache.serve.plan import Plan
from trtllm_mm_cache.serve.ports import bind_problem
from trtllm_mm_cache.serve.service import Kind, Spec
from trtllm_mm_cache.serve.stack import Stack, StackError, Surroundings, say
from trtllm_mm_cache.serve.warm import WarmStart
from trtllm_mm_cache.settings import EncodeSettings, ServeSettings, TierSettings

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_STORE_VARIABLE = "MM_CACHE_STORE_URL"
_LIST_PAUSE_S = 0.1


def run_serve(plan: Plan, encode: EncodeSettings) -> int:
    """Serve until a signal; return the exit status: 130 after Ctrl-C, else 0 if nothing was cut off.

    `encode` are the settings that the encode workers' command line gives. Raises `ConfigurationError` before
    anything has started, `StackError` when a process cannot be kept up without which nothing is served.
    """
    _check_port(plan)
    _check_memory(plan, encode)
    _check_tiers(plan.settings.tiers, encode.tiers)
    folder = RunFolder(plan.settings.run_dir)
    environment = {**os.environ, **_variables(plan, folder)}
    return asyncio.run(_serve(plan, folder, environment))


def _check_tiers(*settings: TierSettings) -> None:
    """Refuse here what the workers would. torch comes with it, a second and 200 MB."""
    if any(tiers.kept for tiers in settings):
        from trtllm_mm_cache.tiers.configured import check_tiers

        for tiers in settings:
            check_tiers(tiers)


async def _serve(plan: Plan, folder: RunFolder, environment: Mapping[str, str]) -> int:
    children = Children()
    stop = _signalled()
    warm = None
    if plan.engine == "transformers":
        warm = WarmStart(children, plan.engine, environment, folder.log("warm start"))
    stack = Stack([*_specs(plan)], Surroundings(folder, environment, children, warm), plan.settings)
    say(f"starting {plan.name} with {plan.engine}; logs are in {folder.path}")
    serving = asyncio.create_task(_keep_serving(stack, plan, folder, environment), name="serving")
    first: set[asyncio.Future[Any]] = {serving, stop}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await stack.drain()
        serving.result()
        raise StackError("the processes are not watched any more")
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return await _stop(stack, stop.result())


async def _keep_serving(stack: Stack, plan: Plan, folder: RunFolder, environment: Mapping[str, str]) -> None:
    began = time.monotonic()
    await stack.start()
    await _wait_found(plan)
    print(hints(plan, folder, environment, time.monotonic() - began), flush=True)
    await stack.keep_up()


async def _stop(stack: Stack, number: signal.Signals) -> int:
    """End the stack; a second signal ends it at once."""
    interrupted = number is signal.SIGINT
    say("stopping" if interrupted else "draining: what runs is finished")
    hurry = asyncio.create_task(_kill_on_signal(stack))
    clean = await stack.drain()
    hurry.cancel()
    return _INTERRUPTED if interrupted else int(not clean)


async def _kill_on_signal(stack: Stack) -> None:
    await _signalled()
    say("ending at once")
    stack.kill()


def _signalled() -> asyncio.Future[signal.Signals]:
    """Return what is done with the next signal to stop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[signal.Signals] = loop.create_future()

    def arrived(number: signal.Signals) -> None:
        if not future.done():
            future.set_result(number)

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, arrived, number)
    return future


def _specs(plan: Plan) -> Iterator[Spec]:
    settings = plan.settings
    yield _frontend(plan)
    for number in range(settings.encode_workers):
        yield Spec(
            Kind.ENCODE,
            f"{Kind.ENCODE.value} {number + 1}",
            plan.encode_arguments(),
            # A store is the PD workers' unless ENCODE_EXTRA_ARGS names it: they ask it first anyway.
            variables={**_devices(settings.encode_cuda_visible_devices), _STORE_VARIABLE: ""},
            warm=settings.encode_python is None and plan.encode_engine == plan.engine,
            python=str(settings.encode_python or sys.executable),
        )
    job = plan.job()
    # mpirun kills its ranks half a second after SIGTERM, and leaves them behind after SIGKILL. SIGUSR1 it
    # passes on, and ours drain on that.
    drain_signal = signal.SIGUSR1 if job and plan.engine == "transformers" else signal.SIGTERM
    for number in range(settings.pd_workers):
        yield Spec(
            Kind.PD,
            f"{Kind.PD.value} {number + 1}",
            plan.pd_arguments(),
            job=job,
            variables={**_devices(settings.pd_cuda_visible_devices), **_store(settings)},
            warm=not job,
            drain_signal=drain_signal,
            end_signal=signal.SIGTERM if job else signal.SIGKILL,
        )


def _frontend(plan: Plan) -> Spec:
    """Return how the frontend is started: everything of it that is not as with the workers."""
    return Spec(
        Kind.FRONTEND,
        Kind.FRONTEND.value,
        plan.frontend_arguments(),
        variables={"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": f"{plan.settings.drain_timeout_s:.0f}"},
        probe=f"{plan.url}/live",
        port=plan.settings.http_port,
    )


def _devices(devices: str | None) -> dict[str, str]:
    return {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}


def _store(settings: ServeSettings) -> dict[str, str]:
    """Return the variable that names the store, for its password stands on no command line."""
    url = settings.tiers.multimodal_embedding_cache_store_url
    return {} if url is None else {_STORE_VARIABLE: url.get_secret_value()}


def _variables(plan: Plan, folder: RunFolder) -> dict[str, str]:
    """Return what the processes need in their environment beside what this one has."""
    defaults = {
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        # Dynamo's own lines: warnings only, so that the workers' one line a request is readable.
        "DYN_LOG": "warn",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "PYTHONUNBUFFERED": "1",
    }
    variables = {name: value for name, value in defaults.items() if name not in os.environ}
    variables["DYN_DISCOVERY_BACKEND"] = plan.settings.discovery_backend
    if plan.settings.discovery_backend == "file":
        # The secret lies in that folder, where `drop` finds it too; the first process makes it.
        variables[DISCOVERY_VARIABLE] = str(folder.claim_discovery(os.environ.get(DISCOVERY_VARIABLE)))
    elif SECRET_VARIABLE not in os.environ:
        variables[SECRET_VARIABLE] = str(folder.make_secret())
    if plan.settings.media.media_proxy is not None:
        variables["MM_CACHE_MEDIA_PROXY"] = plan.settings.media.media_proxy.get_secret_value()
    return variables


def _check_port(plan: Plan) -> None:
    host, port = plan.settings.http_host, plan.settings.http_port
    problem = bind_problem(port, host)
    if problem is None:
        return
    if problem.errno == errno.EADDRINUSE:
        raise ConfigurationError(f"port {port} is taken; set DYN_HTTP_PORT to a free one")
    raise ConfigurationError(
        f"the frontend could not listen on {host}:{port} (DYN_HTTP_HOST, DYN_HTTP_PORT): {problem.strerror}"
    )


def _check_memory(plan: Plan, encode: EncodeSettings) -> None:
    """Raise unless all arenas of all workers fit, together."""
    settings = plan.settings
    arenas = {
        f"{what} of {_count(count, kind)}": count * nbytes
        for role, count, kind in (
            (settings, settings.pd_workers, Kind.PD),
            (encode, settings.encode_workers, Kind.ENCODE),
        )
        for what, nbytes in role.arena_bytes.items()
    }
    check_fits(arenas)


def _count(count: int, kind: Kind) -> str:
    return f"{count} {kind.value}{'s' if count > 1 else ''}"


async def _wait_found(plan: Plan) -> None:
    """Wait until the frontend has found a PD worker, which it does a moment after that is ready."""
    import httpx2

    deadline = time.monotonic() + plan.settings.ready_timeout_s
    async with httpx2.AsyncClient(trust_env=False) as client:  # loopback needs no proxy
        while time.monotonic() < deadline:
            try:
                answer = await client.get(f"{plan.url}/health")
                if answer.is_success and answer.json()["pd_workers"] > 0:
                    return
            except (httpx2.HTTPError, ValueError):
                pass
            await asyncio.sleep(_LIST_PAUSE_S)
    raise StackError("the frontend finds no PD worker")
