"""Connections to media servers, refused by address at the moment they are made.

A name checked before the request can resolve to another address when the connection is opened (DNS
rebinding), and every redirect names a new host. So the check sits where the socket is: names are
resolved here, every address is judged, and the connection goes to exactly the address that passed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from traceback import clear_frames

import httpcore2

from trtllm_mm_cache.errors import MediaFetchError, MediaForbiddenError

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host name or literal and port to addresses, in order of preference. Raises `OSError`."""

_PRIVATE = tuple(
    ip_network(each)
    for each in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # shared address space: carriers, and clusters inside clouds
        "::1/128",
        "fc00::/7",
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR = IPv6Network("2002::/16")
_CLOUD_METADATA = {
    ip_address("169.254.169.254"),  # AWS, Azure, Google Cloud, OpenStack and others
    ip_address("fd00:ec2::254"),  # AWS over IPv6
    ip_address("fd20:ce::254"),  # Google Cloud over IPv6
    ip_address("100.100.100.200"),  # Alibaba Cloud
    ip_address("192.0.0.192"),  # Oracle Cloud
    ip_address("168.63.129.16"),  # Azure's host agent; globally routable by its number
}


def is_forbidden(address: IPv4Address | IPv6Address, *, allow_private: bool) -> bool:
    """Say whether media may not be fetched from `address`.

    Only globally routable unicast passes; addresses that embed an IPv4 address (mapped, NAT64) are
    judged by it. `allow_private` lets private and loopback addresses pass as well, but never
    link-local, multicast, unspecified or reserved ones, nor the metadata service of a cloud.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_forbidden(address.ipv4_mapped, allow_private=allow_private)
        if address in _NAT64:
            return is_forbidden(IPv4Address(int(address) & 0xFFFF_FFFF), allow_private=allow_private)
    if address in _CLOUD_METADATA:
        return True
    if any(address in network for network in _PRIVATE):
        return not allow_private
    if address.is_multicast or address.is_reserved or not address.is_global:
        return True
    return isinstance(address, IPv6Address) and (address not in _GLOBAL_UNICAST or address in _SIX_TO_FOUR)


def refuse_by_name(host: str, *, allow_private: bool) -> None:
    """Raise `MediaForbiddenError` where `host` by itself, without a look-up, is a place not to fetch from.

    An address in any spelling that the system reads as one, or a name that always means this machine. Of
    every other name only who resolves it can tell where it leads.
    """
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        name = "127.0.0.1"
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return
    _refuse([str(sockaddr[0]) for *_, sockaddr in found], allow_private=allow_private)


class SystemResolver:
    """The operating system's resolver, in threads of its own: a hung name server blocks nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="media-dns")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`; raises `OSError` or `UnicodeError`."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))

    def close(self) -> None:
        """Take no further look-ups; those that run end on their own."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """httpcore's network backend with the address check inside.

    A host with one forbidden address among several is refused as a whole: no honest public name
    has one, and taking the others would let a second look-up choose.
    """

    def __init__(self, resolver: Resolver, *, allow_private: bool) -> None:
        self._resolver = resolver
        self._allow_private = allow_private
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Resolve, check, connect, within `timeout` seconds in all.

        Raises `MediaForbiddenError`, `MediaFetchError`, `httpcore2.ConnectTimeout`.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        failure: Exception | None = None
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self._permitted(host, port)
                for position, address in enumerate(addresses):
                    # Each address gets its share of the time, so one that swallows packets leaves
                    # some for the next.
                    left = len(addresses) - position
                    share = None if deadline is None else (deadline - loop.time()) / left
                    try:
                        return await self._sockets.connect_tcp(
                            address, port, share, local_address, socket_options
                        )
                    except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                        clear_frames(error.__traceback__)  # see `HttpFetcher.fetch`
                        failure = error
                raise MediaFetchError("the media server cannot be reached") from failure
        except TimeoutError:
            pass  # raised below, without it as its context: see `HttpFetcher.fetch`
        finally:
            failure = None  # its traceback leads to this frame: a cycle that only the collector would end
        raise httpcore2.ConnectTimeout

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: media never comes from a local socket."""
        raise MediaForbiddenError("media is not fetched from local sockets")

    async def sleep(self, seconds: float) -> None:
        """Wait `seconds`, as httpcore asks between retries."""
        await asyncio.sleep(seconds)

    async def _permitted(self, host: str, port: int) -> list[str]:
        try:
            addresses = list(await self._resolver(host, port))
        except (OSError, UnicodeError) as error:
            raise MediaFetchError("the media server's name cannot be resolved") from error
        if not addresses:
            raise MediaFetchError("the media server's name cannot be resolved")
        _refuse(addresses, allow_private=self._allow_private)
        return addresses


def _refuse(addresses: Iterable[str], *, allow_private: bool) -> None:
    if any(is_forbidden(ip_address(each), allow_private=allow_private) for each in addresses):
        raise MediaForbiddenError("the URL leads to an address that this server does not fetch from")
