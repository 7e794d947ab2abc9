"""Large texts and bodies, one and a hundred at once: refused in words, within the memory that is stated.

The frontend's memory is what it has when it idles, and `--request-memory-mb` for bodies, and what text in
work may take: both are measured from /proc while the requests are under way.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.stack import REPOSITORY, free_port, wait_until
from tests.services import CLI, WITH_US, Service

MB = 1024**2
MODEL = REPOSITORY / "models/shapes-qwen2-vl"
REQUEST_MEMORY_MB = 192
TEXT_MB = 160  # 1 MB of text in work, 160 bytes a character; see `frontend/prompt.py`
MARGIN_MB = 128  # small bodies, threads, what the allocator keeps
AT_ONCE = 100


@dataclass
class Frontend:
    """A frontend with small limits, alone: what is refused reaches no PD worker."""

    service: Service
    client: httpx2.Client

    def rss(self) -> int:
        """Return what it has in memory, in bytes."""
        return self._status("VmRSS")

    def peak(self) -> int:
        """Return the most that it has had since `reset_peak`, in bytes."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        """Count the peak from here."""
        Path(f"/proc/{self.service.popen.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.service.popen.pid}/status").read_text()
        return int(text.partition(f"{name}:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frontend]:
    folder, port = tmp_path_factory.mktemp("large-text"), free_port()
    options = ["--model-path", str(MODEL), "--http-port", str(port)]
    options += ["--request-memory-mb", str(REQUEST_MEMORY_MB), "--max-request-mb", "48"]
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_LOG": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    service = Service("frontend", [*WITH_US, *CLI, "frontend", *options], folder, "listens", environment)
    with ExitStack() as stack:
        service.start()
        stack.callback(service.kill)
        service.wait_ready()
        limits = httpx2.Limits(max_connections=None)
        client = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False, limits=limits
        )
        stack.enter_context(client)
        up = Frontend(service, client)
        wait_until(lambda: up.client.get("/health").status_code == 200, 30, "the frontend does not answer")
        for _ in range(3):  # everything is imported, and threads are there
            ask(up, "x" * 200_000)
        yield up
        assert service.alive


def ask(frontend: Frontend, text: Any) -> httpx2.Response:
    body = {"model": MODEL.name, "messages": [{"role": "user", "content": text}]}
    return frontend.client.post("/v1/chat/completions", json=body)


def post(frontend: Frontend, body: bytes | Iterator[bytes]) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    return frontend.client.post("/v1/chat/completions", content=body, headers=headers)


def in_pieces(nbytes: int) -> Iterator[bytes]:
    """Yield a chat request with a text of so many bytes, never whole in this process."""
    head = {"model": MODEL.name, "messages": [{"role": "user", "content": "@"}]}
    before, after = json.dumps(head).encode().split(b"@")
    yield before
    for _ in range(nbytes // 2**16):
        yield b"word " * (2**16 // 5)
    yield after


def refusal(answer: httpx2.Response) -> str:
    message = answer.json()["error"]["message"]
    assert message
    return str(message)


def test_a_body_of_200_mb_is_refused(frontend: Frontend) -> None:
    frontend.reset_peak()
    before = frontend.rss()
    answer = post(frontend, in_pieces(200 * MB))
    assert answer.status_code == 413
    assert "--max-request-mb" in refusal(answer)
    assert frontend.peak() - before < REQUEST_MEMORY_MB * MB


def test_24_mb_of_text_are_refused_before_they_are_tokenised(frontend: Frontend) -> None:
    frontend.reset_peak()
    before = frontend.rss()
    answer = post(frontend, in_pieces(24 * MB))
    assert answer.status_code == 400
    assert "are taken" in refusal(answer)
    assert frontend.peak() - before < 3 * 48 * MB + 32 * MB


def test_text_that_no_context_holds_is_refused_by_the_models_own_bound(frontend: Frontend) -> None:
    answer = ask(frontend, "word " * 700_000)
    assert answer.status_code == 400
    assert "context" in refusal(answer)


KINDS = {
    "24 MB of text": (24 * MB, {400, 503}),
    "3 MB of text": (3 * MB, {400, 503}),
    "text as long as the context may be": (None, {400, 503}),
    "40 MB in an image's place": (40 * MB, {503, 400}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_at_once_stay_within_the_stated_memory(frontend: Frontend, kind: str) -> None:
    nbytes, statuses = KINDS[kind]
    frontend.reset_peak()
    before = frontend.rss()

    def send(_: int) -> int:
        if nbytes is None:
            return ask(frontend, "a b " * 16_000).status_code
        if "image" in kind:
            return post(frontend, image_in_pieces(nbytes)).status_code
        return post(frontend, in_pieces(nbytes)).status_code

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = Counter(pool.map(send, range(AT_ONCE)))
    assert set(found) <= statuses
    growth = frontend.peak() - before
    print(f"{kind}: {dict(found)}, {before / MB:.0f} MB and {growth / MB:.0f} MB more")
    assert growth < (REQUEST_MEMORY_MB + TEXT_MB + MARGIN_MB) * MB, found
    assert frontend.client.get("/v1/models").status_code == 200


def image_in_pieces(nbytes: int) -> Iterator[bytes]:
    """Yield a chat request with a data: URL of so many bytes; there is no PD worker to take it."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}}
    head = {"model": MODEL.name, "messages": [{"role": "user", "content": [image]}]}
    before, after = json.dumps(head).encode().split(b"@")
    yield before
    for _ in range(nbytes // 2**16):
        yield b"A" * 2**16
    yield after


def test_small_requests_are_answered_while_large_bodies_stand_still(frontend: Frontend) -> None:
    """Clients that announce large bodies and send nothing keep large ones waiting, and nothing else."""
    port = frontend.client.base_url.port
    assert port is not None
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 40000000\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(20):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            held.sendall(head)
        answer = ask(frontend, "Hello")
        assert answer.status_code == 503
        assert "PD worker" in refusal(answer)


def test_the_frontend_is_as_large_as_before_when_all_is_over(frontend: Frontend) -> None:
    for _ in range(2):
        post(frontend, in_pieces(24 * MB))
    settled = frontend.rss()
    for _ in range(6):
        post(frontend, in_pieces(24 * MB))
    wait_until(lambda: frontend.rss() - settled < 48 * MB, 20, "memory of refused bodies is kept")
