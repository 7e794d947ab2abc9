"""What clients are told over HTTP, whatever they send, and what becomes of their connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from tests.frontend.serving import (
    ADAPTER,
    DEADLINE_S,
    MODEL,
    PeerPdWorkers,
    chat,
    events,
    serving,
    token_messages,
)
from trtllm_mm_cache.errors import (
    ConfigurationError,
    EncodeUnavailableError,
    InvalidImageError,
    MediaForbiddenError,
    MediaTooLargeError,
    MmCacheError,
    OverloadedError,
    PdLostError,
    PdUnavailableError,
    PlaceholderMismatchError,
    UnsupportedMediaError,
)
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.server import HttpServer, make_app
from trtllm_mm_cache.settings import FrontendSettings

ITEMS = {"items": {"hits": 1, "misses": 2, "hit_rows": 7}}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="session")
def prompts(prompts_of: Callable[[str], Prompts]) -> Prompts:
    return prompts_of("qwen2_vl")


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """Return an error in OpenAI's form; fails where there is none."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


async def test_the_model_is_always_listed_and_adapters_behind_it(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        listed = (await up.client.get("/v1/models")).json()
        model, adapter = listed["data"]
        assert (model["id"], adapter["id"]) == (MODEL, ADAPTER)
        assert (model.get("parent"), adapter["parent"]) == (None, MODEL)
        for described in (model, adapter):
            assert (await up.client.get(f"/v1/models/{described['id']}")).json() == described
        other = await up.client.get("/v1/models/org/other")
        assert other.status_code == 404
        assert MODEL in error_of(other)["message"]
        for path in ("/health", "/live", "/metrics"):
            assert (await up.client.get(path)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_another_models_name_is_a_404_that_names_the_served_one(prompts: Prompts, path: str) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        asked = (
            {"model": "other", "prompt": "x"} if path.endswith("/completions") and path != CHAT else chat()
        )
        answer = await up.client.post(path, json=asked | {"model": "other"})
    assert answer.status_code == 404
    error = error_of(answer)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert MODEL in error["message"]


@pytest.mark.parametrize(("model", "name"), [(MODEL, None), (ADAPTER, ADAPTER)])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_an_adapter_is_asked_for_by_its_name_as_the_model(
    prompts: Prompts, path: str, model: str, name: str | None
) -> None:
    workers = PeerPdWorkers(token_messages(prompts, "A cat sat"))
    asked = chat() if path == CHAT else {"prompt": "Hello"}
    async with serving(prompts, workers) as up:
        answer = await up.client.post(path, json={**asked, "model": model})
    assert answer.json()["model"] == workers.asked[0]["model"] == model
    assert workers.asked[0]["routing"]["lora_name"] == name


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/responses", "/v1/embeddings", f"{CHAT}/", "/docs"])
async def test_an_unknown_path_says_what_is_served(prompts: Prompts, path: str) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        answer = await up.client.post(path, json=chat())
    assert answer.status_code == 404
    assert CHAT in error_of(answer)["message"]


async def test_responses_are_refused_by_the_paths_that_are_served(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        message = error_of(await up.client.post("/v1/responses", json={"input": "x"}))["message"]
    assert CHAT in message
    assert "/v1/completions" in message


async def test_a_wrong_method_says_which_are_right(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        answer = await up.client.get(CHAT)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "GET" in error_of(answer)["message"]


async def test_an_answer_whole_and_streamed_is_the_same(prompts: Prompts) -> None:
    workers = PeerPdWorkers([{}, ITEMS, *token_messages(prompts, "A cat\nsat. Käfer 猫")])
    async with serving(prompts, workers) as up:
        whole = await up.client.post(CHAT, json=chat())
        streamed = await up.client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True}))
    said = whole.json()["choices"][0]["message"]["content"]
    *chunks, usage, done = events(streamed.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole.json()["usage"]
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    assert (
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        == said
        == "A cat\nsat. Käfer 猫"
    )
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    for answer in (whole, streamed):
        assert answer.headers["x-mm-cache"] == "hits=1, misses=2"
        assert answer.headers["x-request-id"] in answer.text
    assert streamed.headers["content-type"] == "text/event-stream"


async def test_an_answer_without_items_has_no_cache_header(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(token_messages(prompts, "A cat"))) as up:
        answer = await up.client.post(CHAT, json=chat())
    assert "x-mm-cache" not in answer.headers
    assert "prompt_tokens_details" not in answer.json()["usage"]


ERRORS: dict[str, tuple[MmCacheError, int]] = {
    "broken image": (InvalidImageError("is broken", item_index=1), 400),
    "forbidden": (MediaForbiddenError("is private", item_index=0), 400),
    "too large": (MediaTooLargeError("is too large", item_index=0), 413),
    "other format": (UnsupportedMediaError("is no image", item_index=0), 415),
    "placeholders": (PlaceholderMismatchError("do not agree"), 400),
    "no encode worker": (EncodeUnavailableError("no encode worker is alive"), 503),
    "no PD worker": (PdUnavailableError("no PD worker can take this request now"), 503),
    "full": (OverloadedError("too much is under way"), 503),
    "a defect": (MmCacheError("the engine failed on this request"), 503),
    **{f"status {kind.http_status}": (kind("went wrong"), 503) for kind in (ConfigurationError, PdLostError)},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_has_its_status_and_its_text(prompts: Prompts, name: str, stream: bool) -> None:
    failure, status = ERRORS[name]
    async with serving(prompts, PeerPdWorkers([{}, {}, failure])) as up:
        answer = await up.client.post(CHAT, json=chat(stream=stream))
        assert up.count("responses_total", status=str(status)) == 1
    assert answer.status_code == status
    error = error_of(answer)
    assert error["message"] == str(failure)
    assert error["code"] == failure.code
    assert error["type"] == ("server_error" if status == 503 else "invalid_request_error")
    assert ("retry-after" in answer.headers) is failure.retryable
    assert answer.headers["x-request-id"]


async def test_no_defect_is_a_500_and_none_tells_its_text(
    prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    broken: Any = {"token_ids": ["secret"]}
    async with serving(prompts, PeerPdWorkers([broken])) as up:
        answer = await up.client.post(CHAT, json=chat())
    assert answer.status_code == 503
    assert error_of(answer)["message"] == "the frontend failed on this request"
    assert any(record.exc_info for record in caplog.records)


async def test_a_failing_scrape_is_a_503(prompts: Prompts) -> None:
    class Failing:
        def render(self) -> str:
            raise ZeroDivisionError

    settings = FrontendSettings(model_path="m", http_port=1)
    app = make_app(None, None, Failing(), PeerPdWorkers(), None)  # type: ignore[arg-type]
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://frontend.test") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 503
    assert error_of(answer)["type"] == "server_error"
    assert HttpServer.of(app, settings)


@pytest.mark.parametrize("failure", [PdLostError("has gone"), InvalidImageError("is broken", item_index=0)])
async def test_an_error_after_the_stream_began_is_its_last_event(
    prompts: Prompts, failure: MmCacheError
) -> None:
    tokens = token_messages(prompts, "A cat sat")[:-1]
    async with serving(prompts, PeerPdWorkers([*tokens, failure])) as up:
        answer = await up.client.post(CHAT, json=chat(stream=True))
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert chunks
    assert last["error"]["message"] == str(failure)
    assert last["error"]["code"] == failure.code


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_without_a_reason_is_an_error(prompts: Prompts, stream: bool) -> None:
    async with serving(prompts, PeerPdWorkers(token_messages(prompts, "A cat sat")[:-1])) as up:
        answer = await up.client.post(CHAT, json=chat(stream=stream))
    assert answer.status_code == (200 if stream else 503)
    error = events(answer.text)[-1]["error"] if stream else error_of(answer)
    assert error["code"] == "pd_lost"
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_goes_after_a_whole_answer_costs_nothing(prompts: Prompts, stream: bool) -> None:
    script = [*token_messages(prompts, "A cat sat"), {}, PdLostError("has gone")]
    async with serving(prompts, PeerPdWorkers(script)) as up:
        answer = await up.client.post(CHAT, json=chat(stream=stream))
    assert answer.status_code == 200
    assert "error" not in answer.text


async def test_a_stop_string_ends_the_answer_and_the_computation(prompts: Prompts) -> None:
    workers = PeerPdWorkers([*token_messages(prompts, "A cat sat. And")[:-1], asyncio.Event()])
    async with serving(prompts, workers) as up:
        answer = await up.client.post(CHAT, json=chat(stop=["sat"]))
        assert workers.closed.is_set()
    assert answer.json()["choices"][0]["message"]["content"] == "A cat "
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_stops_the_worker(prompts: Prompts, begun: bool) -> None:
    script = [*(token_messages(prompts, "A cat")[:-1] if begun else []), asyncio.Event()]
    workers = PeerPdWorkers(script)
    async with serving(prompts, workers) as up, up.connection() as (reader, writer):
        writer.write(post(chat(stream=True)))
        async with asyncio.timeout(DEADLINE_S):
            if begun:
                await reader.readuntil(b"data: ")
            while not workers.asked:
                await asyncio.sleep(0.01)
            writer.close()
            await workers.closed.wait()
            while not up.count("responses_total", status="499"):
                await asyncio.sleep(0.01)
        assert up.count("responses_in_flight") == 0
        assert up.memory.held_bytes == 0


def post(asked: Any, path: str = CHAT, **headers: str) -> bytes:
    """Return a POST as bytes; a header given as "" is left out."""
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    fields = {"host": "x", "content-type": "application/json", "content-length": str(len(body))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def closes(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the server closes the connection."""
    async with asyncio.timeout(DEADLINE_S):
        return await reader.read()


@pytest.mark.parametrize("sent", [b"", b"G", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: 1\r\n"])
async def test_a_connection_on_which_no_request_comes_is_closed(prompts: Prompts, sent: bytes) -> None:
    async with (
        serving(prompts, PeerPdWorkers(), header_timeout_s=0.2) as up,
        up.connection() as (reader, writer),
    ):
        writer.write(sent)
        assert await closes(reader) == b""


async def test_a_head_that_trickles_in_after_a_first_request_is_closed(prompts: Prompts) -> None:
    async with (
        serving(prompts, PeerPdWorkers(), header_timeout_s=0.3) as up,
        up.connection() as (reader, writer),
    ):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"ready")

        async def trickle() -> None:
            writer.write(b"GET /live HTTP/1.1\r\n")
            for number in range(1000):
                writer.write(f"x-{number}: 1\r\n".encode())
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        with suppress(ConnectionResetError):  # what it writes meanwhile makes a reset of the close
            await closes(reader)
        trickling.cancel()


async def test_an_answer_may_take_longer_than_a_head(prompts: Prompts) -> None:
    """Also that of a second request which came while the first one was answered."""
    gate = asyncio.Event()
    workers = PeerPdWorkers([gate, *token_messages(prompts, "A cat")])
    async with serving(prompts, workers, header_timeout_s=0.2) as up, up.connection() as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n" + post(chat()))
        await reader.readuntil(b"ready")
        await asyncio.sleep(0.6)
        gate.set()
        async with asyncio.timeout(DEADLINE_S):
            assert b"A cat" in await reader.readuntil(b'"finish_reason":"stop"')


async def test_one_connection_too_many_is_told_so(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(), max_connections=2) as up:
        async with up.connection(), up.connection(), up.connection() as (reader, writer):
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            head, _, body = (await closes(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head.lower()
        assert json.loads(body)["error"]["code"] == "overloaded"
        async with asyncio.timeout(DEADLINE_S):
            while (await up.client.get("/v1/models")).status_code != 200:
                await asyncio.sleep(0.01)


async def test_a_slow_body_is_a_408(prompts: Prompts) -> None:
    async with (
        serving(prompts, PeerPdWorkers(), body_timeout_s=0.2) as up,
        up.connection() as (reader, writer),
    ):
        writer.write(post(b'{"mod', content_length="100"))
        async with asyncio.timeout(DEADLINE_S):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert up.memory.held_bytes == 0


async def test_a_body_that_is_too_large_is_a_413_that_its_sender_reads(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(), max_request_mb=1) as up:
        for content in (bytes(8 * 2**20), chunked(bytes(2**16), 128)):
            answer = await up.client.post(CHAT, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 413
            assert "--max-request-mb" in error_of(answer)["message"]
        assert up.memory.held_bytes == 0


async def chunked(chunk: bytes, count: int) -> Any:
    for _ in range(count):
        yield chunk


async def test_a_body_without_a_length_is_taken(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(token_messages(prompts, "A cat"))) as up:
        content = chunked(json.dumps(chat()).encode(), 1)
        answer = await up.client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "says"),
    [({"content-type": "text/plain"}, "Content-Type"), ({"content-encoding": "gzip"}, "compressed")],
)
async def test_another_kind_of_body_is_refused(prompts: Prompts, headers: dict[str, str], says: str) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        sent = {"content-type": "application/json"} | headers
        answer = await up.client.post(CHAT, content=b"{}", headers=sent)
    assert answer.status_code == 400
    assert says in error_of(answer)["message"]


async def test_bytes_that_are_no_http_are_a_400(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up, up.connection() as (reader, writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert (await closes(reader)).startswith(b"HTTP/1.1 400 ")


async def test_stopping_finishes_what_runs_and_takes_nothing_new(prompts: Prompts) -> None:
    gate = asyncio.Event()
    workers = PeerPdWorkers(
        [*token_messages(prompts, "A cat sat")[:1], gate, *token_messages(prompts, " on it")]
    )
    async with (
        serving(prompts, workers) as up,
        up.connection() as (idle, _),
        up.connection() as (reader, writer),
    ):
        writer.write(post(chat(stream=True)))
        await reader.readuntil(b"data: ")
        up.server.stop()
        assert await closes(idle) == b""
        with pytest.raises(ConnectionRefusedError):
            async with up.connection():
                pytest.fail("it still listens")
        gate.set()
        assert b"[DONE]" in await closes(reader)
        async with asyncio.timeout(DEADLINE_S):
            await up.ended


def test_a_drain_time_that_is_none_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "soon")
    app = make_app(None, None, None, PeerPdWorkers(), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS=soon"):
        HttpServer.of(app, FrontendSettings(model_path="m"))


async def test_text_beyond_the_context_is_refused_before_it_is_tokenised(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers()) as up:
        answers = [
            await up.client.post(CHAT, json=chat("word " * 500_000)),
            await up.client.post("/v1/completions", json={"model": MODEL, "prompt": "word " * 500_000}),
            await up.client.post(CHAT, json=chat("word " * 900_000)),
        ]
    for answer in answers:
        assert answer.status_code == 400
        message = error_of(answer)["message"]
        assert "context" in message or "are taken" in message


async def test_the_traffic_of_others_goes_on_while_a_large_text_is_refused(prompts: Prompts) -> None:
    async with serving(prompts, PeerPdWorkers(token_messages(prompts, "A cat"))) as up:
        large = [asyncio.create_task(up.client.post(CHAT, json=chat("x" * 3_000_000))) for _ in range(4)]
        assert (await up.client.post(CHAT, json=chat())).status_code == 200
        assert {answer.status_code for answer in await asyncio.gather(*large)} <= {400, 503}
