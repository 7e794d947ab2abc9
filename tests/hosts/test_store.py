"""A second host that has never seen the images gets them from the store: no encode there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.chaos.questions import MAX_TOKENS, MODEL, make_questions
from tests.e2e.stack import pd_workers_seen, wait_until
from tests.hosts.network import Host, reason_to_skip, two_hosts
from tests.services import CLI, Service

_PORTS = {"pd": 9000, "encode": 9001}


class Stack:
    """Frontend, PD worker and encode worker of one host, which know of each other alone."""

    def __init__(self, host: Host, folder: Path, environment: dict[str, str]) -> None:
        self.host, self.url = host, "http://127.0.0.1:8000/v1"
        folder.mkdir()
        environment = {**environment, "DYN_FILE_KV": str(folder / "discovery"), "HF_HUB_OFFLINE": "1"}
        capacity = ("--multimodal-embedding-cache-capacity-gb", "0.03")

        def service(role: str, ready: str, *more: str) -> Service:
            words = host.command(*CLI, role, "--model-path", str(MODEL), *more)
            return Service(role, words, folder, ready, environment, _PORTS.get(role, 0))

        self.services = [
            service("frontend", "frontend listens"),
            service("pd", "PD worker ready", *capacity),
            service("encode", "encode worker ready"),
        ]

    def __enter__(self) -> Stack:
        for each in self.services:
            each.start()
        for each in self.services:
            each.wait_ready()
        wait_until(lambda: self.host.do(lambda: pd_workers_seen(self.url)) == 1, 30, "no PD worker is found")
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.services:
            each.kill()

    def ask(self, message: Any) -> str:
        def work() -> str:
            with openai.OpenAI(
                base_url=self.url,
                api_key="none",
                timeout=60,
                max_retries=0,
                http_client=openai.DefaultHttpxClient(trust_env=False),
            ) as client:
                answer = client.chat.completions.create(
                    model=MODEL.name, messages=[message], max_tokens=MAX_TOKENS, temperature=0
                )
                return answer.choices[0].message.content or ""

        return self.host.do(work)

    def metric(self, role: str, name: str, **labels: str) -> float:
        (service,) = (each for each in self.services if each.name == role)
        return self.host.do(lambda: service.process.metric(name, **labels))


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    reason = reason_to_skip("redis-server")
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as (near, far, _):
        yield near, far


def test_what_one_host_encoded_the_other_need_not(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    near, far = hosts
    questions = [each for each in make_questions(random.Random(13), 20, 4) if each.pictures]
    secret = tmp_path / "secret"
    secret.write_text("s" * 64)
    secret.chmod(0o600)
    environment = {
        "MM_CACHE_STORE_URL": f"redis://user:hunter2@{near.address}:6379/0",
        "MM_CACHE_ENTRIES_SECRET_FILE": str(secret),
    }
    server = ("redis-server", "--bind", near.address, "--port", "6379", "--save", "", "--dir", str(tmp_path))
    access = (
        "--user",
        "default",
        "off",
        "--user",
        "user",
        "on",
        ">hunter2",
        "~mm-cache:*",
        "+@all",
        "-@admin",
        "-@dangerous",
    )
    store = Service("redis", near.command(*server, *access), tmp_path, "Ready to accept connections")
    with ExitStack() as running:
        store.start()
        running.callback(store.kill)
        store.wait_ready()
        with Stack(near, tmp_path / "near", environment) as first:
            for question in questions:
                for _ in range(2):
                    assert first.ask(question.message) == question.answer
            encodes = int(first.metric("encode", "trtllm_mm_cache_encodes_total"))
            stored = "trtllm_mm_cache_tier_offers_total"
            wait_until(
                lambda: first.metric("pd", stored, tier="store", outcome="stored") == encodes,
                20,
                "not stored",
            )
        with Stack(far, tmp_path / "far", environment) as second:
            for question in questions:
                assert second.ask(question.message) == question.answer
            assert encodes > 0
            assert second.metric("encode", "trtllm_mm_cache_encodes_total") == 0
            assert second.metric("pd", "trtllm_mm_cache_tier_lookups_total", outcome="hit") == encodes
