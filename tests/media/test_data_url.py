"""data: URLs: what decodes, what is refused, and that nothing else can happen."""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.media.conftest import Refused, limited
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.errors import MediaReferenceError, MediaTooLargeError, RequestError
from trtllm_mm_cache.media import MediaSource
from trtllm_mm_cache.media.data_url import decode_data_url

BODY = bytes(range(256)) * 3 + b"?"  # one byte over: the base64 is padded
LIMIT = 1 << 20


def base64_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "reference",
    [
        base64_url(BODY),
        base64_url(BODY).rstrip("="),
        base64_url(BODY).replace("data:image/png;base64", "DATA:;BASE64"),
        base64_url(BODY).replace("image/png", "text/html;charset=utf-8"),
        "data:image/png;base64," + base64.encodebytes(BODY).decode(),
        "data:image/png;base64," + base64.encodebytes(BODY).decode().replace("\n", "\r\n"),
        "data:image/png;base64," + quote(base64.b64encode(BODY).decode(), safe=""),
        "data:image/png," + quote_from_bytes(BODY, safe=""),
        "data:," + quote_from_bytes(BODY),
    ],
)
async def test_every_form_gives_the_same_bytes(source: MediaSource, reference: str) -> None:
    assert await source.fetch(reference, Scope()) == BODY


@pytest.mark.parametrize(
    "reference",
    [
        "data:",
        "data:image/png;base64",
        "data:;base64,A",
        "data:;base64,AAAAA",
        "data:;base64,AA=A",
        "data:;base64,AA===",
        "data:;base64,A===",
        "data:;base64,=AAA",
        "data:;base64,AA==AAAA",
        "data:;base64,AA-_",
        "data:;base64,AA!A",
        "data:;base64,AA\x00A",
        "data:;base64,AA%00A",
        "data:;base64,AA%zzA",
        "data:;base64,é",
        "data:,é",
        "data:;base64,\ud800",
    ],
)
async def test_broken_ones_are_refused(source: MediaSource, refused: Refused, reference: str) -> None:
    await refused(source, reference, MediaReferenceError)


@pytest.mark.parametrize("form", [base64_url, lambda data: "data:," + quote_from_bytes(data, safe="")])
@pytest.mark.parametrize("size", [1, 2, 3, 1000, 300_000])
async def test_the_size_limit_is_exact(refused: Refused, form: object, size: int) -> None:
    assert callable(form)
    reference = form(b"\xff" * size)
    async with limited(max_file_bytes=size) as source:
        assert await source.fetch(reference, Scope()) == b"\xff" * size
    if size > 1:
        async with limited(max_file_bytes=size - 1) as source:
            await refused(source, reference, MediaTooLargeError)


async def test_a_payload_of_bare_percents_does_not_slip_past_the_limit(refused: Refused) -> None:
    async with limited(max_file_bytes=100) as source:
        await refused(source, "data:," + "%" * 101, MediaTooLargeError)


async def test_a_long_one_leaves_the_event_loop_free() -> None:
    """A decode of 40 MB takes tens of milliseconds; the loop must go round meanwhile."""
    data = bytes(40_000_000)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    async with limited() as source:
        ticking = asyncio.create_task(turn())
        reference = base64_url(data)
        await asyncio.sleep(0)
        before = turns
        assert await source.fetch(reference, Scope()) == data
        during = turns - before
        ticking.cancel()
    assert during >= 2


@given(st.binary(max_size=500))
@example(b"")
def test_what_was_encoded_comes_back(data: bytes) -> None:
    assert decode_data_url(base64_url(data), LIMIT) == data
    assert decode_data_url("data:," + quote_from_bytes(data), LIMIT) == data


HEADERS = st.sampled_from(["data:", "data:,", "data:;base64,", "DATA:a/b ;base64 ,", "data:;base64;x,"])


@given(HEADERS, st.text() | st.text(alphabet="ABab01+/=% \n-_"), st.integers(0, 8))
def test_any_text_gives_bytes_within_the_limit_or_a_request_error(header: str, text: str, limit: int) -> None:
    size, shown = 0, ""
    try:
        size = len(decode_data_url(header + text, limit))
    except RequestError as error:
        shown = str(error)
    assert size <= limit
    assert len(text) < 5 or text not in shown
