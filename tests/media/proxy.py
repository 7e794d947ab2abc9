"""An HTTP proxy on 127.0.0.1 that resolves every name itself: to 127.0.0.1."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """Forwards GET and tunnels CONNECT. `asked` holds each request's first line and header lines.

    With `login` ("user:password") others are refused with 407; with `refuses` everyone is, with that status.
    """

    login: str | None = None
    refuses: str | None = None
    port: int = 0
    asked: list[tuple[str, list[str]]] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def url(self, login: str = "", scheme: str = "http") -> str:
        return f"{scheme}://{login}127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._relay(reader, writer)
        writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            self.asked.append((first, lines))
            if (status := self._refusal(lines)) is not None:
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
                continue
            method, target, _ = first.split(" ")
            if method == "CONNECT":
                answers, requests = await self._connect(int(target.rpartition(":")[2]))
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                await asyncio.gather(_pipe(reader, requests), _pipe(answers, writer))
                return
            url = urlsplit(target)
            answers, requests = await self._connect(url.port or 80)
            own = [line for line in lines if not line.lower().startswith("proxy-")]
            path = f"{url.path}?{url.query}" if url.query else url.path
            text = "\r\n".join([f"{method} {path} HTTP/1.1", *own, "Connection: close", "", ""])
            requests.write(text.encode("latin-1"))
            head = (await answers.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:"))
            writer.write(head.encode("latin-1") + await answers.readexactly(length))
            requests.close()

    async def _connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.gather(*self.tasks)

    def _refusal(self, lines: list[str]) -> str | None:
        if self.refuses is not None:
            return self.refuses
        if self.login is not None:
            token = base64.b64encode(self.login.encode()).decode()
            if f"proxy-authorization: basic {token}".lower() not in {line.lower() for line in lines}:
                return "407 Proxy Authentication Required"
        return None


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxying(tls: ssl.SSLContext | None = None, **options: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(**options)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
