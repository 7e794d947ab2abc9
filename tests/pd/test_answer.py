"""The PD worker's handler around the engine: what it streams, and what an engine's failure comes to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from dynamo.runtime import Context

from tests.pd.bench import Bench, admit_all, image_url
from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import GenerationRequest, PlaceLogprobs, TokenDelta, TokenLogprob
from trtllm_mm_cache.errors import EncodeUnavailableError
from trtllm_mm_cache.pd.answer import PdWorker
from trtllm_mm_cache.settings import PdSettings


class PeerGenerator:
    """A generator on the engine's own interface: counts to three, or fails as an engine might."""

    fingerprint = "ab" * 32

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.stalls_after = 0
        self.held: list[int] = []
        self.logprobs: tuple[PlaceLogprobs, ...] = ()
        self.deltas: tuple[TokenDelta, ...] = ()

    def variant(self, image_count: int) -> str:
        return ""

    def check_embedding(self, *announced: object) -> None:
        """The resolver of these tests has a check of its own."""

    async def generate(
        self, request: GenerationRequest, leases: Sequence[Lease]
    ) -> AsyncGenerator[TokenDelta, None]:
        self.held = [lease.nbytes for lease in leases if not lease.released]
        for delta in self.deltas:
            yield delta
        if self.deltas:
            return
        yield TokenDelta((1,), 10, logprobs=self.logprobs[:1])
        if self.stalls_after == 1:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        yield TokenDelta((2, 3), 10, "stop", self.logprobs[1:])
        if self.stalls_after == 2:
            await asyncio.Event().wait()

    async def failed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def generator() -> PeerGenerator:
    return PeerGenerator()


@pytest.fixture
def worker(bench: Bench, generator: PeerGenerator) -> PdWorker:
    return PdWorker(generator, bench.resolver, bench.metrics, PdSettings(model_path="m"), admit_all)


def request(*references: str) -> dict[str, Any]:
    return {"token_ids": [1], "multi_modal_data": {"image_url": [{"Url": url} for url in references]}}


async def run(worker: PdWorker, payload: Any) -> list[dict[str, Any]]:
    return [output async for output in worker.handle(payload, Context())]


def refusal(output: dict[str, Any]) -> tuple[str, str]:
    """Return the class and the text of the message that ends an answer with an error."""
    assert output["_dynamo_annotated"]
    assert output["event"] == "error"
    return output["error"]["class"], output["error"]["public"]["message"]


def errors(bench: Bench) -> dict[str, float]:
    return {
        sample.labels["code"]: sample.value
        for family in bench.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "trtllm_mm_cache_errors_total" and sample.value > 0
    }


async def test_tokens_and_usage_are_streamed_while_the_leases_are_held(
    worker: PdWorker, generator: PeerGenerator, bench: Bench
) -> None:
    outputs = await run(worker, request(image_url(), image_url()))
    assert [output["token_ids"] for output in outputs] == [[1], [2, 3]]
    assert outputs[-1]["finish_reason"] == "stop"
    assert outputs[0]["completion_usage"]["completion_tokens"] == 1, "an answer may end at any token"
    assert outputs[-1]["completion_usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
    }
    assert len(generator.held) == 2
    await bench.nothing_held()


async def test_several_answers_to_one_request_say_whose_tokens_they_are(
    worker: PdWorker, generator: PeerGenerator, bench: Bench
) -> None:
    generator.deltas = (
        TokenDelta((1,), 10, "stop", choice=1, cached_tokens=8),
        TokenDelta((2, 3), 10, "length", choice=0, cached_tokens=8),
    )
    outputs = await run(worker, request() | {"sampling_options": {"n": 2}})
    assert [(output["index"], output["finish_reason"]) for output in outputs] == [(1, "stop"), (0, "length")]
    usage = outputs[-1]["completion_usage"]
    assert (usage["completion_tokens"], usage["prompt_tokens_details"]) == (3, {"cached_tokens": 8})
    await bench.nothing_held()


async def test_logprobs_go_in_the_form_of_dynamos_workers(worker: PdWorker, generator: PeerGenerator) -> None:
    outputs = await run(worker, request())
    assert not any({"log_probs", "top_logprobs"} & output.keys() for output in outputs)
    best = (TokenLogprob(9, -0.25), TokenLogprob(1, -0.5))
    generator.logprobs = tuple(PlaceLogprobs(TokenLogprob(token, -0.5), best) for token in (1, 2, 3))
    first, second = await run(worker, request())
    assert (first["log_probs"], second["log_probs"]) == ([-0.5], [-0.5, -0.5])
    place = [
        {"rank": 1, "token_id": 9, "logprob": -0.25},
        {"rank": 2, "token_id": 1, "logprob": -0.5},
    ]
    assert (first["top_logprobs"], second["top_logprobs"]) == ([place], [place, place])
    generator.logprobs = tuple(PlaceLogprobs(TokenLogprob(token, -0.5), ()) for token in (1, 2, 3))
    assert "top_logprobs" not in (await run(worker, request()))[0]


@pytest.mark.parametrize(("heard", "outcome"), [(1, "stopped"), (2, "served")], ids=["early", "at-the-end"])
async def test_who_leaves_with_the_last_token_was_served(
    worker: PdWorker, generator: PeerGenerator, bench: Bench, heard: int, outcome: str
) -> None:
    """As Dynamo's frontend does, which knows the model's end token."""
    generator.stalls_after = heard
    outputs = worker.handle(request(image_url()), Context())
    for _ in range(heard):
        await anext(outputs)
    await outputs.aclose()
    await bench.nothing_held()
    counted = {
        sample.labels["outcome"]: sample.value
        for family in bench.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "trtllm_mm_cache_requests_total" and sample.value
    }
    assert counted == {outcome: 1}


async def test_an_engines_own_failure_is_a_500_whose_text_stays_in_the_log(
    worker: PdWorker, generator: PeerGenerator, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    generator.failure = RuntimeError("CUDA error at /secret/path.cu")
    with caplog.at_level(logging.ERROR):
        *_, last = await run(worker, request(image_url()))
    assert refusal(last)[0] == "Internal"
    assert "secret" not in str(last)
    assert "/secret/path.cu" in caplog.text
    assert errors(bench) == {"internal_error": 1}
    await bench.nothing_held()


async def test_a_clients_mistake_is_an_invalid_request_and_raises_nothing(
    worker: PdWorker, bench: Bench
) -> None:
    """What a handler raises, Dynamo prints with its traceback."""
    (only,) = await run(worker, request("gopher://x"))
    kind, text = refusal(only)
    assert kind == "InvalidRequest"
    assert text.startswith("image 1: ")
    assert text.endswith(" [media_reference]")
    assert errors(bench) == {"media_reference": 1}


async def test_no_encode_worker_is_a_503_and_never_a_504(worker: PdWorker, bench: Bench) -> None:
    bench.peer.changes = [EncodeUnavailableError("gone"), EncodeUnavailableError("gone")]
    (only,) = await run(worker, request(image_url()))
    assert refusal(only) == ("Unavailable", "image 1: gone [encode_unavailable]")
