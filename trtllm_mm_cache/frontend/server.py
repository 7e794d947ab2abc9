"""The HTTP server: its routes, and uvicorn with the bounds that strangers meet."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trtllm_mm_cache.errors import (
    ConfigurationError,
    InvalidRequestError,
    MmCacheError,
    OverloadedError,
)
from trtllm_mm_cache.frontend.apis import Api
from trtllm_mm_cache.frontend.endpoint import Completions
from trtllm_mm_cache.frontend.models import Models
from trtllm_mm_cache.frontend.responses import Reply, error_object, status_of
from trtllm_mm_cache.observability.metrics import Exposition
from trtllm_mm_cache.runtime.pd_client import PdWorkers
from trtllm_mm_cache.settings import FrontendSettings

DRAIN_VARIABLE = "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"
_DRAIN_S = 60


class Endpoint:
    """One API of `completions` as an ASGI application."""

    def __init__(self, completions: Completions, api: Api) -> None:
        self._answer = partial(completions.answer, api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._answer(scope, receive, send)


def make_app(
    chat: Endpoint, text: Endpoint, exposition: Exposition, workers: PdWorkers, served: Models
) -> Starlette:
    """Return the application."""

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": await served.described()})

    async def one_model(request: Request) -> Response:
        try:
            return JSONResponse(await served.one_described(request.path_params["name"]))
        except MmCacheError as error:
            return JSONResponse(error_object(error), status_of(error))

    async def alive(request: Request) -> Response:
        del request
        return JSONResponse({"status": "ready", "pd_workers": len(workers.instances)})

    async def metrics(request: Request) -> Response:
        del request
        return PlainTextResponse(await asyncio.to_thread(exposition.render))

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", alive),
        Route("/live", alive),
        Route("/metrics", metrics),
    ]
    paths = ", ".join(route.path for route in routes)

    async def unknown_path(request: Request, error: Exception) -> Response:
        del request, error
        text = f"nothing is served under this path; {paths} are"
        return JSONResponse(error_object(InvalidRequestError(text)), 404)

    async def wrong_method(request: Request, error: Any) -> Response:
        text = f"{request.method} is not served under this path"
        return JSONResponse(error_object(InvalidRequestError(text)), 405, headers=error.headers)

    async def defect(request: Request, error: Exception) -> Response:
        del request, error  # uvicorn logs it
        failure = MmCacheError("the frontend failed on this request")
        return JSONResponse(error_object(failure), status_of(failure))

    handlers = {404: unknown_path, 405: wrong_method, Exception: defect}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a path with one more is another path
    return app


class HttpServer(uvicorn.Server):
    """uvicorn, stopped by its owner: signals are the owner's."""

    @classmethod
    def of(cls, app: Starlette, settings: FrontendSettings) -> HttpServer:
        """Return a server for `app`; it listens once `serve` runs."""

        class Protocol(_BoundedProtocol):
            header_timeout_s = settings.header_timeout_s
            max_connections = settings.max_connections

        return cls(
            uvicorn.Config(
                app,
                host=settings.http_host,
                port=settings.http_port,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_drain_s(),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def stop(self) -> None:
        """Take nothing new, finish what runs; `serve` returns then."""
        self.should_exit = True


def _drain_s() -> int:
    value = os.environ.get(DRAIN_VARIABLE, str(_DRAIN_S))
    if not (value.isascii() and value.isdecimal()):
        raise ConfigurationError(f"{DRAIN_VARIABLE}={value} is no whole number of seconds")
    return int(value)


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request on one connection too many, which is closed."""
    del scope, receive
    error = OverloadedError("too many connections are open; retry in a moment")
    await Reply(send, {"connection": "close"}).error(error)


class _BoundedProtocol(HttpToolsProtocol):
    """Closes a connection on which no request comes; uvicorn bounds only the time after a first one.

    Its own bound on connections answers without a text of ours.
    """

    header_timeout_s = 0.0
    max_connections = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # uvicorn stops this timer as soon as a byte arrives, and so would a head that never ends.
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._no_head)

    def on_headers_complete(self) -> None:
        self._head_timer.cancel()
        if len(self.connections) > self.max_connections:
            self.app = _full
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # no request that came meanwhile is being answered
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._no_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _no_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
