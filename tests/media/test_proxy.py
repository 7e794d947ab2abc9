"""A proxy for media: everything goes through it, it resolves names, and nothing tells its password."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence

import pytest
import trustme
from click.testing import CliRunner
from pydantic import ValidationError

from tests.media.conftest import Refused
from tests.media.images import LIMITS
from tests.media.origin import Origin, Resource, serving
from tests.media.proxy import Proxy, proxying
from tests.media.test_network import SPELLINGS_OF_LOOPBACK, server_context
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.errors import MediaFetchError, MediaForbiddenError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.settings import MediaSettings

BODY = bytes(range(256)) * 40
PASSWORD = "p%40ss-secret"


async def no_lookup(host: str, port: int) -> Sequence[str]:
    raise AssertionError("a name is looked up here, though the proxy resolves it")


def through(proxy: Proxy, login: str = "", **settings: object) -> MediaSource:
    values = {"media_proxy": proxy.url(login), **settings}
    return MediaSource(MediaSettings.model_validate(values), LIMITS, resolver=no_lookup)


async def test_http_goes_through_the_proxy_which_resolves_the_name(origin: Origin) -> None:
    origin.routes["/a"] = Resource(BODY)
    async with proxying() as proxy, through(proxy) as source:
        url = origin.url("/a?b=c", host="images.test")
        assert [await source.fetch(url, Scope()) for _ in range(2)] == [BODY] * 2
        assert [first for first, _ in proxy.asked] == [f"GET {url} HTTP/1.1"] * 2
    assert [asked.headers["host"] for asked in origin.asked] == [f"images.test:{origin.port}"] * 2


async def test_https_goes_through_a_tunnel_that_the_proxy_cannot_read(authority: trustme.CA) -> None:
    async with (
        serving(server_context(authority, "images.test")) as origin,
        proxying() as proxy,
        through(proxy) as source,
    ):
        origin.routes["/secret"] = Resource(BODY)
        url = origin.url("/secret", host="images.test", scheme="https")
        assert await source.fetch(url, Scope()) == BODY
        assert [first for first, _ in proxy.asked] == [f"CONNECT images.test:{origin.port} HTTP/1.1"]


async def test_a_tunnel_to_another_server_is_not_trusted(authority: trustme.CA, refused: Refused) -> None:
    async with (
        serving(server_context(authority, "images.test")) as origin,
        proxying() as proxy,
        through(proxy) as source,
    ):
        await refused(source, origin.url("/a", host="other.test", scheme="https"), MediaFetchError)
        assert origin.asked == []


async def test_a_proxy_that_is_spoken_to_over_tls(origin: Origin, authority: trustme.CA) -> None:
    origin.routes["/a"] = Resource(BODY)
    async with proxying(server_context(authority, "127.0.0.1")) as proxy:
        settings = MediaSettings.model_validate({"media_proxy": proxy.url(scheme="https")})
        async with MediaSource(settings, LIMITS, resolver=no_lookup) as source:
            assert await source.fetch(origin.url("/a", host="images.test"), Scope()) == BODY


async def test_what_is_fresh_asks_neither_server_nor_proxy(origin: Origin) -> None:
    origin.routes["/a"] = Resource(BODY, {"Cache-Control": "max-age=60"})
    async with proxying() as proxy, through(proxy) as source:
        for _ in range(3):
            await source.fetch(origin.url("/a", host="images.test"), Scope())
        assert len(proxy.asked) == 1


async def test_no_proxy_of_the_environment_goes_around_it(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    origin.routes["/a"] = Resource(BODY)
    async with proxying() as proxy, through(proxy) as source:
        await source.fetch(origin.url("/a", host="images.test"), Scope())
        assert len(proxy.asked) == 1


# The password.


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_password_reaches_the_proxy_and_nobody_else(
    authority: trustme.CA, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    caplog.set_level(logging.INFO)
    tls: ssl.SSLContext | None = server_context(authority, "images.test") if scheme == "https" else None
    async with (
        serving(tls) as origin,
        proxying(login="user:p@ss-secret") as proxy,
        through(proxy, f"user:{PASSWORD}@") as source,
    ):
        origin.routes["/a"] = Resource(BODY)
        assert await source.fetch(origin.url("/a", "images.test", scheme), Scope()) == BODY
    assert not any(name.startswith("proxy") for asked in origin.asked for name in asked.headers)
    assert "secret" not in caplog.text


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_password_that_the_proxy_does_not_take_is_not_repeated(
    origin: Origin, refused: Refused, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    caplog.set_level(logging.INFO)
    async with proxying(login="user:other") as proxy, through(proxy, f"user:{PASSWORD}@") as source:
        url = origin.url("/a", "images.test", scheme)
        message = await refused(source, url, MediaFetchError)
        assert "proxy" in message
        assert ("407" in message) is (scheme == "http")
    assert origin.asked == []
    assert "secret" not in caplog.text


def test_the_settings_do_not_show_it() -> None:
    settings = MediaSettings.model_validate({"media_proxy": f"http://user:{PASSWORD}@proxy.test:3128"})
    assert "secret" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


# Failures.


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", ["403 Forbidden", "502 Bad Gateway", "503 secret"])
async def test_what_the_proxy_refuses_is_refused(
    origin: Origin, refused: Refused, scheme: str, status: str
) -> None:
    async with proxying(refuses=status) as proxy, through(proxy) as source:
        assert "proxy" in await refused(source, origin.url("/a", "images.test", scheme), MediaFetchError)
        assert len(proxy.asked) == 1
    assert origin.asked == []


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there(origin: Origin, refused: Refused, scheme: str) -> None:
    async with proxying() as proxy:
        pass
    async with through(proxy) as source:
        assert "proxy" in await refused(source, origin.url("/a", "images.test", scheme), MediaFetchError)
    assert origin.connections == 0, "nothing is fetched directly instead"


async def test_a_proxy_that_does_not_answer(refused: Refused) -> None:
    async with asyncio.timeout(10), serving() as silent:
        stalled = asyncio.Event()
        silent.routes["http://images.test/a"] = lambda asked, writer: stalled.wait()  # type: ignore[assignment,return-value]
        settings = MediaSettings.model_validate(
            {"media_proxy": f"http://127.0.0.1:{silent.port}", "media_timeout_s": 0.3}
        )
        async with MediaSource(settings, LIMITS, resolver=no_lookup) as source:
            await refused(source, "http://images.test/a", MediaFetchError)
        stalled.set()


# Addresses: what the URL itself says is judged here, whatever the proxy would do with it.


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "host",
    [
        *SPELLINGS_OF_LOOPBACK,
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "127.0.0.1.",
        "10.1.2.3",
        "169.254.169.254",
        "[fe80::1]",
        "[::ffff:10.0.0.1]",
        "[64:ff9b::169.254.169.254]",
    ],
)
async def test_an_address_that_is_not_fetched_from_never_reaches_the_proxy(
    refused: Refused, host: str, scheme: str
) -> None:
    async with proxying() as proxy, through(proxy) as source:
        await refused(source, f"{scheme}://{host}/secret", MediaForbiddenError)
        assert proxy.asked == []


async def test_a_redirect_to_an_address_is_judged_too(origin: Origin, refused: Refused) -> None:
    origin.routes["/a"] = Resource(b"", {"Location": "http://169.254.169.254/secret"}, "302 Found")
    async with proxying() as proxy, through(proxy) as source:
        await refused(source, origin.url("/a", "images.test"), MediaForbiddenError)
        assert len(proxy.asked) == 1


async def test_private_addresses_go_through_the_proxy_where_they_are_allowed(
    origin: Origin, refused: Refused
) -> None:
    origin.routes["/a"] = Resource(BODY)
    async with proxying() as proxy, through(proxy, allow_private_addresses=True) as source:
        assert await source.fetch(origin.url("/a"), Scope()) == BODY
        assert len(proxy.asked) == 1
        await refused(source, "http://169.254.169.254/secret", MediaForbiddenError)


# The flag.


@pytest.mark.parametrize(
    "value",
    [
        "proxy.test:3128",
        "socks5://user:secret@proxy.test:1080",
        "http://user:secret@",
        "http://proxy.test:3128/secret",
        "http://us er:secret@proxy.test",
        "http://a@secret@proxy.test",
        "http://proxy.test:99999",
        "http://:3128",
        "",
    ],
)
def test_what_is_no_proxy_is_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MediaSettings.model_validate({"media_proxy": value})
    assert "secret" not in str(caught.value)
    for arguments, environment in (
        (["--media-proxy", value], {}),
        ([], {"MM_CACHE_MEDIA_PROXY": value}),
    ):
        if not value and environment:
            continue  # click takes an empty variable for none
        result = CliRunner().invoke(cli, ["pd", "--model-path", "/nowhere", *arguments], env=environment)
        assert result.exit_code == 2
        assert "--media-proxy: " in result.output
        assert "secret" not in result.output


@pytest.mark.parametrize(
    "value",
    [
        "http://proxy.test",
        "HTTPS://user:a%40b@proxy.test:3128/",
        "http://10.0.0.1:3128",
        "http://[fd00::1]:3128",
    ],
)
def test_what_is_a_proxy(value: str) -> None:
    settings = MediaSettings.model_validate({"media_proxy": value})
    assert settings.media_proxy is not None
    assert settings.media_proxy.get_secret_value() == value
