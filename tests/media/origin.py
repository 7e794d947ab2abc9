"""A media server on 127.0.0.1 that does what its routes say and remembers what it was asked."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """One request as it came in; header names in lower case."""

    path: str
    headers: dict[str, str]


Responder = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


Headers = Mapping[str, str] | Sequence[tuple[str, str]]
"""Fields of a response; a sequence may have several lines of one name."""


def answer(writer: asyncio.StreamWriter, status: str, headers: Headers, body: bytes = b"") -> None:
    """Write a whole response. Content-Length is added unless the status has no body."""
    fields = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
    if not status.startswith("304") and "content-length" not in {name.lower() for name, _ in fields}:
        fields.append(("Content-Length", str(len(body))))
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields)
    writer.write(head.encode("latin-1") + b"\r\n" + body)


@dataclass
class Resource:
    """A body with headers, as an ordinary server would give it: 304 where its validators say so."""

    body: bytes
    headers: Headers = ()
    status: str = "200 OK"
    bodies_sent: int = 0

    async def __call__(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        named = {name.lower(): value for name, value in dict(self.headers).items()}
        etag, modified = named.get("etag"), named.get("last-modified")
        if (etag is not None and asked.headers.get("if-none-match") == etag) or (
            etag is None and modified is not None and asked.headers.get("if-modified-since") == modified
        ):
            answer(writer, "304 Not Modified", self.headers)
        else:
            self.bodies_sent += 1
            answer(writer, self.status, self.headers, self.body)


class Origin:
    """Serve `routes` until closed. `asked` holds every request, `connections` counts accepted sockets."""

    def __init__(self) -> None:
        self.routes: dict[str, Responder] = {}
        self.asked: list[Asked] = []
        self.connections = 0
        self.open_connections = 0
        self.closing = asyncio.Event()
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._idle = asyncio.Condition()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def until_open(self, count: int) -> None:
        """Wait until exactly `count` connections are open."""
        async with asyncio.timeout(10), self._idle:
            await self._idle.wait_for(lambda: self.open_connections == count)

    async def until_asked(self, count: int) -> None:
        """Wait until at least `count` requests have come in."""
        async with asyncio.timeout(10), self._idle:
            await self._idle.wait_for(lambda: len(self.asked) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        await self._count(1)
        try:
            while not self.closing.is_set():
                asked = _parse(await reader.readuntil(b"\r\n\r\n"))
                self.asked.append(asked)
                await self._count(0)
                await self.routes[asked.path.partition("?")[0]](asked, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, as it may at any time
        finally:
            self._writers.discard(writer)
            writer.close()
            await self._count(-1)

    async def _count(self, change: int) -> None:
        async with self._idle:
            self.open_connections += change
            self._idle.notify_all()

    async def close(self) -> None:
        self.closing.set()
        for writer in list(self._writers):
            writer.transport.abort()
        await self.until_open(0)


def _parse(head: bytes) -> Asked:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return Asked(first.split(" ")[1], {name.lower(): value.strip() for name, _, value in pairs})


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    origin = Origin()
    server = await asyncio.start_server(origin._serve, "127.0.0.1", 0, ssl=tls)
    origin.port = server.sockets[0].getsockname()[1]
    try:
        yield origin
    finally:
        server.close()
        await origin.close()
