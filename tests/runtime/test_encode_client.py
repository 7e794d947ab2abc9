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
    """One instance, which takes and answers calls when it is let; `taken_back` has their ids."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()
        self.asked = 0
        self.context: Context | None = None
        self.failure: Exception | None = None
        self.taken_back: list[str] = []
        self.members = MEMBERS

    def instance_ids(self) -> list[int]:
        return [1]

    async def direct(self, request: Any, instance: int, context: Context) -> AsyncIterator[dict[str, Any]]:
        if "media" in request["apart"]:
            self.context = context
            self.asked += 1
        if self.failure is not None:
            raise self.failure
        await self.takes.wait()

        async def answers(payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
            if "cancel" in payload:
                self.taken_back.append(payload["cancel"])
                return
            assert payload["media"] == REQUEST.media
            await self.let.wait()
            yield READY.model_dump()

        return self.members.guarded(ENCODE, instance, answers)(request, context)


@pytest.fixture
def peer() -> PeerClient:
    return PeerClient()


async def left(client: EncodeClient, peer: PeerClient, unwanted: list[EncodeReady]) -> None:
    """Begin a call, and leave it while the encode worker works; it is told, and the answer awaited."""
    call = asyncio.create_task(client.encode(1, REQUEST, unwanted.append))
    while peer.context is None:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(5):
        while not peer.taken_back:
            await asyncio.sleep(0)
    assert peer.taken_back == [peer.context.id()]
    assert not peer.context.is_stopped(), "Dynamo would lose an answer that is on its way"


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


async def test_a_worker_that_cannot_be_told_has_the_call_stopped(peer: PeerClient) -> None:
    client = EncodeClient(peer, MEMBERS)
    call = asyncio.create_task(client.encode(1, REQUEST, pytest.fail))
    while peer.context is None:
        await asyncio.sleep(0)
    peer.failure = Exception("Unavailable: TCP connection to 127.0.0.1:1 failed")
    call.cancel()
    async with asyncio.timeout(5):
        while not peer.context.is_stopped():
            await asyncio.sleep(0)
    await client.close()


async def test_few_calls_are_sent_at_a_time_and_one_that_is_not_is_not_taken_back(peer: PeerClient) -> None:
    peer.takes.clear()
    peer.let.set()
    client = EncodeClient(peer, MEMBERS)
    calls = [asyncio.create_task(client.encode(1, REQUEST, pytest.fail)) for _ in range(6)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert peer.asked == 4
    calls[5].cancel()
    peer.takes.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers[:5] == [READY] * 5
    assert isinstance(answers[5], asyncio.CancelledError)
    assert (peer.asked, peer.taken_back) == (5, [])


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
