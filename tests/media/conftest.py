from __future__ import annotations

import asyncio
import gc
import re
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import trustme

from tests.media.images import LIMITS
from tests.media.origin import Origin, serving
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.settings import MB, ImageLimits, MediaSettings


def check_politeness(error: MmCacheError) -> None:
    """The message names no library, function, address or path."""
    assert not re.search(r"PIL|Pillow|libjpeg|zlib|\b0x|/|struct|Traceback|BytesIO|Errno", str(error))


Refused = Callable[[MediaSource, str, type[MmCacheError]], Awaitable[str]]


def limited(max_file_bytes: int = LIMITS.max_file_bytes, **settings: object) -> MediaSource:
    """A source with the given settings that may reach the origin on 127.0.0.1."""
    return MediaSource(
        MediaSettings.model_validate({"allow_private_addresses": True, **settings}),
        ImageLimits(max_file_size_mb=max_file_bytes / MB),
    )


@pytest.fixture(scope="session", autouse=True)
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[trustme.CA]:
    """The one certificate authority that these tests trust; loading it is quick, unlike the world's."""
    trusted = trustme.CA()
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    trusted.cert_pem.write_to_path(path)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(path))
        yield trusted


async def nothing_kept(traced: Callable[[], int], before: int, nbytes: int) -> None:
    """Wait until less than `nbytes` more than `before` are allocated: a thread may still end its work."""
    try:
        async with asyncio.timeout(10):
            while traced() - before >= nbytes:
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"{traced() - before} bytes are kept")


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Switch the cyclic collector off; the function returns the bytes that Python has allocated since."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gc.enable()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with serving() as running:
        yield running


@pytest.fixture
async def source() -> AsyncIterator[MediaSource]:
    """A source that may reach the origin on 127.0.0.1."""
    async with limited() as opened:
        yield opened


@pytest.fixture
def refused() -> Refused:
    """Check that a fetch fails with the given error, in words that give nothing away; return them."""

    async def check(source: MediaSource, reference: str, kind: type[MmCacheError]) -> str:
        with pytest.raises(kind) as caught:
            await source.fetch(reference, Scope())
        assert type(caught.value) is kind
        message = str(caught.value)
        for secret in ("127.0.0.1", "169.254", "secret", "/", "localhost", "Errno", "0x"):
            shown = message.replace("file:///path", "").replace("file://", "")
            assert secret not in shown, f"{secret!r} is shown in {message!r}"
        return message

    return check
