"""Calls whose caller leaves: what was answered all the same is an export that must be released.

The peer stands on the interface of Dynamo's client, whose streams hand out what had arrived before a stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dynamo.runtime import Context

from trtllm_mm_cache.errors import EncodeUnavailableError, EncodeUnreachableError, NotAMemberError
from trtllm_mm_cache.runtime.encode_client import EncodeClient
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.messages import ENCODE, EncodeReady, EncodeRequest
from trtllm_mm_cache.runtime.streaming import RequestContext

MEMBERS = Membership(b"the deployment's secret" * 2)
REQUEST = EncodeRequest(fingerprint="ab" * 32, key="cd" * 32, media=b"image")
READY = EncodeReady(
    fingerprint=REQUEST.fingerprint,
    key=REQUEST.key,
    peer={},
    token="t",
    address=64,
    nbytes=8,
    checksum=1,
    dtype="float32",
    shape=(1, 2),
    encode_seconds=0.0,
    origin="encoded",
)


class PeerClient:
    """One instance, which answers when it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.context: Context | None = None
        self.failure: Exception | None = None
        self.members = MEMBERS

    def instance_ids(self) -> list[int]:
        return [1]

    async def direct(self, request: Any, instance: int, context: Context) -> AsyncIterator[dict[str, Any]]:
        self.context = context
        if self.failure is not None:
            raise self.failure

        async def answers(payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
            assert payload["media"] == REQUEST.media
            await self.let.wait()
            yield READY.model_dump()

        return self.members.guarded(ENCODE, instance, answers)(request, context)


@pytest.fixture
def peer() -> PeerClient:
    return PeerClient()


async def left(client: EncodeClient, peer: PeerClient, unwanted: list[EncodeReady]) -> None:
    """Begin a call, and leave it while the encode worker works."""
    call = asyncio.create_task(client.encode(1, REQUEST, unwanted.append))
    while peer.context is None:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert peer.context.is_stopped()


async def test_an_answer_reaches_its_caller_alone(peer: PeerClient) -> None:
    unwanted: list[EncodeReady] = []
    peer.let.set()
    assert await EncodeClient(peer, MEMBERS).encode(1, REQUEST, unwanted.append) == READY
    assert unwanted == []


async def test_an_encode_worker_with_another_secret_is_not_believed(peer: PeerClient) -> None:
    peer.let.set()
    peer.members = Membership(b"another deployment's secret" * 2)
    with pytest.raises(NotAMemberError, match="says that this process does not"):
        await EncodeClient(peer, MEMBERS).encode(1, REQUEST, pytest.fail)


async def test_an_encode_worker_without_a_secret_is_not_believed(peer: PeerClient) -> None:
    class Impostor(PeerClient):
        async def direct(
            self, request: Any, instance: int, context: Context
        ) -> AsyncIterator[dict[str, Any]]:
            async def answers() -> AsyncIterator[dict[str, Any]]:
                yield READY.model_dump()

            return answers()

    with pytest.raises(NotAMemberError, match="did not prove"):
        await EncodeClient(Impostor(), MEMBERS).encode(1, REQUEST, pytest.fail)


async def test_an_answer_whose_caller_has_gone_is_released(peer: PeerClient) -> None:
    unwanted: list[EncodeReady] = []
    client = EncodeClient(peer, MEMBERS)
    await left(client, peer, unwanted)
    peer.let.set()
    async with asyncio.timeout(5):
        while not unwanted:
            await asyncio.sleep(0)
    assert unwanted == [READY]
    await client.close()


async def test_closing_waits_for_no_answer(peer: PeerClient) -> None:
    unwanted: list[EncodeReady] = []
    client = EncodeClient(peer, MEMBERS)
    await left(client, peer, unwanted)
    async with asyncio.timeout(5):
        await client.close()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Unavailable: TCP connection to 127.0.0.1:1 failed", EncodeUnreachableError),
        ("Unavailable: instance_id=1 not found for endpoint dynamo/encode/encode", EncodeUnreachableError),
        ("DeadlineExceeded: TCP request to 127.0.0.1:1 timed out", EncodeUnavailableError),
        ("Unavailable: Stream ended before generation completed", EncodeUnavailableError),
    ],
)
async def test_dynamos_words_tell_what_never_left_from_what_may_have(
    peer: PeerClient, words: str, error: type[Exception]
) -> None:
    peer.failure = Exception(words)  # Dynamo raises bare ones
    with pytest.raises(EncodeUnavailableError) as caught:
        await EncodeClient(peer, MEMBERS).encode(1, REQUEST, pytest.fail)
    assert type(caught.value) is error
