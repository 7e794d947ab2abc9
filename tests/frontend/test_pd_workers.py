"""A real frontend before PD workers that die, stand still, refuse and fail: what its clients are told."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.e2e.stack import REPOSITORY, free_port, wait_until
from tests.frontend.serving import events
from tests.services import CLI, WITH_US, Service

MODEL = REPOSITORY / "models/shapes-qwen2-vl"


@dataclass
class Front:
    """A frontend and two peers of PD workers, each a process of its own."""

    folder: Path
    frontend: Service
    peers: list[Service]
    url: str
    openai: openai.OpenAI
    http: httpx2.Client

    def ask(self, steps: str, **options: Any) -> httpx2.Response:
        """Ask whichever peer gets it to follow these steps."""
        said = {"role": "user", "content": f"<<{steps}>>"}
        body = {"model": MODEL.name, "messages": [said], **options}
        return self.http.post("/v1/chat/completions", json=body)

    def say(self, steps: str) -> str:
        """Ask by the OpenAI client, which must get an answer at once."""
        answer = self.openai.chat.completions.create(
            model=MODEL.name, messages=[{"role": "user", "content": f"<<{steps}>>"}]
        )
        return answer.choices[0].message.content or ""

    def seen(self) -> int:
        """Return how many PD workers the frontend finds."""
        return int(self.http.get("/health").json()["pd_workers"])

    def sees(self, count: int) -> None:
        """Wait until it finds so many."""
        wait_until(lambda: self.seen() == count, 30, f"the frontend does not find {count} PD workers")

    def calls(self, peer: Service) -> int:
        """Return how often a peer was called since its start."""
        return peer.log.read_text().count("called")

    def unproven(self, peer: Service) -> None:
        """Let a peer refuse every request as the client's mistake, without a proof that it may speak."""
        (self.folder / f"{peer.name}.full").write_text("unproven")

    def full(self, peer: Service, full: bool = True) -> None:
        """Have a peer refuse everything, or not."""
        path = self.folder / f"{peer.name}.full"
        path.touch() if full else path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_LOG": "error",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    port = free_port()
    model = ["--model-path", str(MODEL)]
    frontend = Service(
        "frontend",
        [*WITH_US, *CLI, "frontend", *model, "--http-port", str(port)],
        folder,
        "listens",
        environment,
    )
    peers = [
        Service(
            name,
            [*WITH_US, CLI[0], "-m", "tests.frontend.pd_peer", *model],
            folder,
            "PD peer ready",
            environment | {"PD_PEER_FULL": str(folder / f"{name}.full")},
        )
        for name in ("peer-1", "peer-2")
    ]
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        frontend.start()
        stack.callback(frontend.kill)
        frontend.wait_ready()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0)
        stack.callback(client.close)
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=60, trust_env=False))
        up = Front(folder, frontend, peers, url, client, http)
        # Before any PD worker is there.
        assert up.http.get("/v1/models").json()["data"][0]["id"] == MODEL.name
        assert_unavailable(up.ask("say A cat;finish"))
        for peer in peers:
            peer.start()
            stack.callback(peer.kill)
        for peer in peers:
            peer.wait_ready()
        yield up


@pytest.fixture
def front(running: Front) -> Iterator[Front]:
    """The running processes; afterwards every peer runs, takes requests and is found."""
    yield running
    for peer in running.peers:
        running.full(peer, False)
        if peer.alive:
            peer.signal(signal.SIGCONT)
        else:
            peer.start()
            peer.wait_ready()
    assert running.frontend.alive
    running.sees(2)


def assert_unavailable(answer: httpx2.Response, code: str = "pd_unavailable") -> None:
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert "PD worker" in error["message"]
    assert "retry" in error["message"]
    assert answer.headers["retry-after"] == "1"


def test_an_answer_comes_through(front: Front) -> None:
    front.sees(2)
    assert front.say("items;say A cat sat. Käfer 猫;beat;finish") == "A cat sat. Käfer 猫"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        ("error invalid_image image 1: is broken", 400, "invalid_image"),
        ("error media_too_large image 2: has too many pixels", 413, "media_too_large"),
        ("error unsupported_media image 1: no format", 415, "unsupported_media"),
        ("error encode_unavailable no encode worker is alive", 503, "encode_unavailable"),
        ("error checksum_mismatch image 1: bytes differ", 503, "checksum_mismatch"),
        ("error generation_error the engine failed", 503, "generation_error"),
        ("error from_the_future image 1: something new", 503, "encode_failed"),
        ("raise", 503, "pd_lost"),
    ],
)
def test_what_a_worker_reports_has_its_status(
    front: Front, step: str, status: int, code: str, stream: bool
) -> None:
    answer = front.ask(f"beat;{step}", stream=stream)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert "secret" not in answer.text
    if step.startswith("error") and code != "encode_failed":
        assert error["message"] == step.split(" ", 2)[2]


def test_a_worker_that_dies_in_the_middle(front: Front) -> None:
    answer = front.ask("say A cat sat;die", stream=True)
    *chunks, last = events(answer.text)
    assert chunks[0]["choices"][0]["delta"]["content"]
    assert last["error"]["code"] == "pd_lost"
    wait_until(lambda: sum(peer.alive for peer in front.peers) == 1, 10, "no peer has died")
    with pytest.raises(openai.APIError, match="PD worker"):
        for _ in front.openai.chat.completions.create(
            model=MODEL.name, messages=[{"role": "user", "content": "<<say A cat sat;die>>"}], stream=True
        ):
            pass
    wait_until(lambda: not any(peer.alive for peer in front.peers), 10, "the other peer has not died")


def test_a_dead_worker_that_is_still_listed_is_left_for_another(front: Front) -> None:
    front.peers[0].kill()
    assert front.seen() == 2
    for _ in range(4):
        assert front.say("say It works;finish") == "It works"


def test_a_worker_that_refuses_is_left_for_another(front: Front) -> None:
    for full in front.peers:
        front.full(full)
        for _ in range(3):
            assert front.say("say It works;finish") == "It works"
        front.full(full, False)
    for peer in front.peers:
        front.full(peer)
    answer = front.ask("say No;finish")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert answer.headers["retry-after"] == "1"


def test_what_a_worker_says_without_its_proof_is_not_believed(front: Front) -> None:
    for liar in front.peers:
        front.unproven(liar)
        for _ in range(3):
            assert front.say("say It works;finish") == "It works"
        front.full(liar, False)
    for peer in front.peers:
        front.unproven(peer)
    answer = front.ask("say No;finish")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_a_member")


def test_no_request_is_repeated_once_a_worker_has_taken_it(front: Front) -> None:
    before = [front.calls(peer) for peer in front.peers]
    answer = front.ask("beat;error overloaded full after all")
    assert answer.status_code == 503
    assert sum(front.calls(peer) for peer in front.peers) == sum(before) + 1


def test_a_client_that_leaves_stops_the_computation(front: Front) -> None:
    ended = sum(peer.log.read_text().count("ended") for peer in front.peers)
    body = {
        "model": MODEL.name,
        "messages": [{"role": "user", "content": "<<say A cat;wait>>"}],
        "stream": True,
    }
    with front.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert "chat.completion.chunk" in next(answer.iter_lines())
    # Dynamo stops the request's context or closes its handler, whichever comes first.
    wait_until(
        lambda: sum(peer.log.read_text().count("ended") for peer in front.peers) == ended + 1,
        30,
        "no peer was told that its client has gone",
    )


def test_a_frozen_worker_is_left_for_another_and_one_that_freezes_is_an_error(front: Front) -> None:
    front.peers[0].signal(signal.SIGSTOP)
    for _ in range(2):  # the first of them may meet it, if it is the one that is asked first
        assert front.say("say It works;finish") == "It works"
    front.peers[0].signal(signal.SIGCONT)
    front.sees(2)
    answer = front.ask("say A cat;freeze", stream=True)
    assert events(answer.text)[-1]["error"]["code"] == "pd_lost"


def test_with_every_worker_frozen_it_is_a_503_with_a_text(front: Front) -> None:
    for peer in front.peers:
        peer.signal(signal.SIGSTOP)
    for _ in range(2):  # while they are listed, and when they are not any more
        answer = front.ask("say No;finish")
        assert answer.status_code == 503, answer.text
        assert "PD worker" in answer.json()["error"]["message"]
    assert front.http.get("/v1/models").status_code == 200


def test_restarted_workers_are_found_and_nothing_else_than_503_is_said_meanwhile(front: Front) -> None:
    for peer in front.peers:
        peer.stop()
    front.sees(0)
    assert_unavailable(front.ask("say No;finish"))
    assert_unavailable(front.ask("say No;finish", stream=True))
    with pytest.raises(openai.InternalServerError, match="no PD worker"):
        front.say("say No;finish")
    front.peers[0].start()
    statuses = set()

    def answered() -> bool:
        answer = front.ask("say It works;finish")
        statuses.add(answer.status_code)
        return answer.status_code == 200

    wait_until(answered, 60, "a restarted PD worker was not found")
    assert statuses <= {200, 503}


def test_sigterm_finishes_what_runs(front: Front) -> None:
    body = {
        "model": MODEL.name,
        "messages": [{"role": "user", "content": "<<say A cat;wait>>"}],
        "stream": True,
    }
    with front.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        front.frontend.signal(signal.SIGTERM)
        wait_until(lambda: "draining" in front.frontend.log.read_text(), 10, "no drain")
        assert front.frontend.alive
        for peer in front.peers:
            peer.kill()  # which ends the answer
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert said[-1]["error"]["code"] == "pd_lost"
    assert front.frontend.ended() == 0
    front.frontend.start()
    front.frontend.wait_ready()
