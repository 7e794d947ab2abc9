"""The whole stack with SGLang in the PD worker, by launch script and OpenAI's client: true answers only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from PIL import Image

from tests.e2e.cards import MAX_TOKENS, Asked, Deal
from tests.e2e.conftest import generate_answer
from tests.e2e.stack import Stack, launched, message, wait_until
from tests.engines.contract import chat_case
from tests.services import files_that_outlive
from tests.sglang.models import DEMO

READY_S = 560
PATIENCE_S = 120
CARDS_SEED = 20261127
LEASED = "trtllm_mm_cache_leased_entries"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two encode workers by transformers and one PD worker by SGLang."""
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.125",
        ready_timeout_s=READY_S,
        ENGINE="sglang",
        ENCODE_WORKERS="2",
        MODEL_PATH=str(DEMO),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def deal() -> Deal:
    """Return cards that transformers itself answers truly."""

    def oracle(images: Sequence[Image.Image], texts: Sequence[str], max_tokens: int = 8) -> str:
        return generate_answer(chat_case(DEMO, list(images), texts), max_tokens)

    return Deal(oracle, CARDS_SEED)


def asked_of(stack: Stack, card: Asked, **options: object) -> bool:
    """Whether the answer is true."""
    return stack.ask(*card.parts, max_tokens=MAX_TOKENS, **options) == card.answer


def leased(stack: Stack) -> float:
    return stack.total("PD", LEASED)


@pytest.mark.parametrize("requests", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_of_two_tenants_none_is_answered_wrongly(stack: Stack, deal: Deal, requests: int) -> None:
    """Misses, hits, and bursts of both; images of one size and one text among them; two images too."""
    cards = [deal("place") for _ in range(8)]
    for _ in range(4):
        cards += deal.same_question()
    cards += deal.both_orders()
    images = {id(picture) for card in cards for picture in card.pictures}
    before = stack.encodes()
    rounds = requests // (2 * len(cards)) + 1
    jobs = [(card, salt) for _ in range(rounds) for card in cards for salt in ("one", "two")]
    with ThreadPoolExecutor(16) as pool:
        right = list(pool.map(lambda job: asked_of(stack, job[0], extra_body={"cache_salt": job[1]}), jobs))
    assert len(right) >= requests
    assert right.count(False) == 0
    assert stack.encodes() - before == 2 * len(images), "one encode an image and tenant"
    assert leased(stack) == 0


def test_a_stream_and_a_client_that_leaves_it(stack: Stack, deal: Deal) -> None:
    card = deal("describe")
    stream = stack.client.chat.completions.create(
        model=stack.model, messages=[message(*card.parts)], max_tokens=MAX_TOKENS, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == card.answer
    assert len([piece for piece in pieces if piece]) > 1, "it came in pieces"
    left = stack.client.chat.completions.create(
        model=stack.model,
        messages=[message(*card.parts)],
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(left))
    assert leased(stack) > 0
    left.close()
    wait_until(lambda: leased(stack) == 0, PATIENCE_S, "the lease of a client that left was not released")
    assert asked_of(stack, card)


def test_an_encode_worker_that_is_killed_costs_nothing_but_time(stack: Stack, deal: Deal) -> None:
    known, unknown = deal.same_question()
    assert asked_of(stack, known)
    os.kill(stack.workers("encode")[0].pid, signal.SIGKILL)
    assert asked_of(stack, known), "a hit needs no encode worker"
    assert asked_of(stack, unknown), "the other one encodes"


@pytest.mark.long
def test_a_scheduler_that_is_killed_ends_the_worker_by_name_and_it_comes_back(
    stack: Stack, deal: Deal
) -> None:
    (worker,) = stack.workers("PD")
    card = deal()
    scheduler = next(
        process
        for process in psutil.Process(worker.pid).children(recursive=True)
        if "scheduler" in " ".join(process.cmdline())
    )
    scheduler.kill()
    wait_until(lambda: not worker.alive(), 30, "the PD worker did not end with its scheduler")
    assert "SGLang's scheduler or another of its processes has ended" in Path(worker.log).read_text()
    wait_until(lambda: answers(stack, card), READY_S, "the PD worker did not come back")


@pytest.mark.long
def test_what_a_killed_worker_leaves_the_next_one_removes(stack: Stack, deal: Deal) -> None:
    card = deal()
    wait_until(lambda: answers(stack, card), READY_S, "no PD worker serves")
    (worker,) = [each for each in stack.workers("PD") if each.alive()]
    files = files_that_outlive(worker.pid)
    assert sum(file.is_socket() for file in files) >= 5
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not worker.alive(), 30, "the PD worker did not end")
    wait_until(lambda: answers(stack, card), READY_S, "the PD worker did not come back")
    assert [file for file in files if file.exists()] == []


def answers(stack: Stack, card: Asked) -> bool:
    try:
        return asked_of(stack, card)
    except openai.OpenAIError:
        return False
