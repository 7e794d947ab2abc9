"""Where media may come from: addresses are judged when the connection is made, whatever the name said."""

from __future__ import annotations

import asyncio
import ssl
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme

from tests.media.conftest import Refused
from tests.media.images import LIMITS
from tests.media.origin import Asked, Origin, Resource, serving
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaFetchError, MediaForbiddenError, MediaReferenceError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.media.network import is_forbidden
from trtllm_mm_cache.settings import MediaSettings

BODY = b"image"

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "2606:4700:4700::1111",
    "2a00:1450:4001::1",
    "64:ff9b::808:808",
]

PRIVATE = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "fc00::1",
    "fd12:3456::1",
    "::ffff:127.0.0.1",
    "::ffff:10.1.2.3",
    "64:ff9b::a00:1",
    "64:ff9b::7f00:1",
]

NEVER = [
    "0.0.0.0",  # noqa: S104
    "0.1.2.3",
    "169.254.169.254",
    "169.254.0.1",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::7f00:1",
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "5f00::1",
    "4000::1",
]


@pytest.mark.parametrize(
    ("address", "strict", "private"),
    [
        *((each, False, False) for each in PUBLIC),
        *((each, True, False) for each in PRIVATE),
        *((each, True, True) for each in NEVER),
    ],
)
def test_which_addresses_are_forbidden(address: str, strict: bool, private: bool) -> None:
    assert is_forbidden(ip_address(address), allow_private=False) is strict
    assert is_forbidden(ip_address(address), allow_private=True) is private


SPELLINGS_OF_LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "localhost",
    "LOCALHOST",
    "0",
    "0.0.0.0",  # noqa: S104
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]",
]


@pytest.mark.parametrize("host", SPELLINGS_OF_LOOPBACK)
async def test_loopback_is_forbidden_however_it_is_written(
    origin: Origin, refused: Refused, host: str
) -> None:
    async with MediaSource(MediaSettings(), LIMITS) as source:
        await refused(source, origin.url("/secret", host=host), MediaForbiddenError)
    assert origin.connections == 0


@pytest.mark.parametrize(
    "host",
    [
        "0177.0.0.1",
        "017700000001",
        "0x7f.1",
        "127.0.0.1.",
        "localhost.",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "ⓛocalhost",
        "%6cocalhost",
        "127.0.0.1%2f.example.invalid",
        "example.invalid\\@127.0.0.1",
        "[::1%25lo]",
        "[fe80::1%25lo]",
    ],
)
async def test_odd_spellings_never_connect(origin: Origin, host: str) -> None:
    # Which error it is depends on the system's resolver: some of these are no address to it.
    async with MediaSource(MediaSettings(), LIMITS) as source:
        with pytest.raises((MediaForbiddenError, MediaFetchError, MediaReferenceError)):
            await source.fetch(origin.url("/secret", host=host), Scope())
    assert origin.connections == 0


class Names:
    """A resolver whose answers follow a script; the last one repeats."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def test_a_public_name_that_leads_inside_is_refused(origin: Origin, refused: Refused) -> None:
    answers = [[each] for each in PRIVATE + NEVER] + [["8.8.8.8", "127.0.0.1"], ["::1", "1.1.1.1"]]
    names = Names(*answers)
    async with MediaSource(MediaSettings(), LIMITS, resolver=names) as source:
        for _ in answers:
            await refused(source, origin.url("/secret", host="images.test"), MediaForbiddenError)
    assert len(names.asked) == len(answers)
    assert origin.connections == 0


async def test_the_connection_goes_to_the_address_that_was_judged(origin: Origin) -> None:
    origin.routes["/a"] = Resource(BODY, {"Connection": "close"})
    names = Names(["127.0.0.1"])
    async with MediaSource(MediaSettings(allow_private_addresses=True), LIMITS, resolver=names) as source:
        assert await source.fetch(origin.url("/a", host="images.test"), Scope()) == BODY
    assert names.asked == ["images.test"], "one look-up for one connection"
    assert origin.asked[0].headers["host"] == f"images.test:{origin.port}"


async def test_a_name_that_changes_between_connections_is_judged_again(
    origin: Origin, refused: Refused
) -> None:
    async def once(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await Resource(BODY, {"Connection": "close"})(asked, writer)
        await writer.drain()
        writer.close()

    origin.routes["/a"] = once
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    async with MediaSource(MediaSettings(allow_private_addresses=True), LIMITS, resolver=names) as source:
        assert await source.fetch(origin.url("/a", host="images.test"), Scope()) == BODY
        await origin.until_open(0)
        await refused(source, origin.url("/a", host="images.test"), MediaForbiddenError)
    assert origin.connections == 1


async def test_a_dead_address_does_not_hide_a_live_one(origin: Origin) -> None:
    origin.routes["/a"] = Resource(BODY)
    # 127.0.0.2 is loopback as well, but the origin listens on 127.0.0.1 alone.
    names = Names(["127.0.0.2", "127.0.0.1"])
    async with MediaSource(MediaSettings(allow_private_addresses=True), LIMITS, resolver=names) as source:
        assert await source.fetch(origin.url("/a", host="images.test"), Scope()) == BODY


async def test_a_resolver_that_hangs_is_given_up(refused: Refused) -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    settings = MediaSettings(connect_timeout_s=0.2)
    async with asyncio.timeout(5), MediaSource(settings, LIMITS, resolver=hang) as source:
        await refused(source, "http://images.test/secret", MediaFetchError)


async def test_an_unknown_name(refused: Refused) -> None:
    async with MediaSource(MediaSettings(), LIMITS, resolver=Names([])) as source:
        await refused(source, "http://secret.invalid/", MediaFetchError)


async def test_proxies_and_credentials_of_the_environment_are_not_used(
    origin: Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    origin.routes["/a"] = Resource(BODY)
    async with MediaSource(MediaSettings(allow_private_addresses=True), LIMITS) as source:
        assert await source.fetch(origin.url("/a"), Scope()) == BODY
    assert "authorization" not in origin.asked[0].headers


def server_context(authority: trustme.CA, host: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    return context


async def test_https_verifies_the_name_and_not_the_address(authority: trustme.CA, refused: Refused) -> None:
    async with serving(server_context(authority, "images.test")) as origin:
        origin.routes["/a"] = Resource(BODY)
        settings = MediaSettings(allow_private_addresses=True)
        async with MediaSource(settings, LIMITS, resolver=Names(["127.0.0.1"])) as source:
            assert await source.fetch(origin.url("/a", host="images.test", scheme="https"), Scope()) == BODY
            await refused(source, origin.url("/a", host="other.test", scheme="https"), MediaFetchError)
            await refused(source, origin.url("/a", host="127.0.0.1", scheme="https"), MediaFetchError)
    assert len(origin.asked) == 1


async def test_https_trusts_no_other_authority(refused: Refused) -> None:
    async with serving(server_context(trustme.CA(), "images.test")) as origin:
        settings = MediaSettings(allow_private_addresses=True)
        async with MediaSource(settings, LIMITS, resolver=Names(["127.0.0.1"])) as source:
            await refused(source, origin.url("/a", host="images.test", scheme="https"), MediaFetchError)
    assert origin.asked == []
