"""`launch/agg_multimodal.sh`: a frontend and vLLM with its own tower, asked over HTTP: true answers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from PIL import Image

from tests.e2e.stack import Process, Stack, launched, message, wait_until
from tools.demo_model.pictures import draw, random_scene
from tools.demo_model.questions import ask

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # engines are started, some twice

READY_S = 300
ENTRY_BYTES = 6 * 128 * 4
"""Of a card, in the demo model: 6 rows of 128 float32."""

HELD_CARDS = 8
STORED = "trtllm_mm_cache_tier_offers_total"
FOUND = "trtllm_mm_cache_tier_lookups_total"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with launched(
        tmp_path_factory.mktemp("agg") / "run",
        "--multimodal-embedding-cache-capacity-gb",
        f"{HELD_CARDS * ENTRY_BYTES / 1024**3:.15f}",
        script="agg_multimodal.sh",
        ready_timeout_s=READY_S,
    ) as running:
        yield running


class Card:
    """A drawn card and a question with one true answer."""

    def __init__(self, rng: random.Random) -> None:
        question = None
        while question is None:
            scene = random_scene(rng)
            question = ask([scene], "place", rng)
        self.image: Image.Image = draw(scene)
        self.question = question.text
        self.truth = question.answer


def cards(count: int, seed: int) -> list[Card]:
    """Return cards; print the seed, so that a failure can be had again."""
    print(f"cards of seed {seed}")
    rng = random.Random(seed)
    return [Card(rng) for _ in range(count)]


def answer(stack: Stack, card: Card) -> str:
    return stack.ask(card.image, card.question, max_tokens=48)


def pd(stack: Stack) -> Process:
    (worker,) = [each for each in stack.workers("PD") if each.alive()]
    return worker


def engine_processes(stack: Stack) -> list[psutil.Process]:
    """Return EngineCore and vLLM's worker, below the PD worker."""
    below = psutil.Process(pd(stack).pid).children(recursive=True)
    return [each for each in below if "EngineCore" in each.name() or "VLLM" in " ".join(each.cmdline())]


def known(stack: Stack, count: int, seed: int) -> list[Card]:
    """Return cards that the model answers truly; it knows nearly all."""
    true = [card for card in cards(count, seed) if answer(stack, card) == card.truth]
    assert len(true) >= 0.8 * count, "the demo model knows its cards"
    return true


def test_there_are_no_encode_workers(stack: Stack) -> None:
    assert [each.name for each in stack.processes] == ["frontend", "PD worker 1"]


def test_misses_and_hits_are_answered_truly(stack: Stack) -> None:
    (card,) = known(stack, 1, 3)
    before = pd(stack).metric("trtllm_mm_cache_encodes_total")
    hits = pd(stack).metric("dynamo_component_embedding_cache_hits_total")
    assert {answer(stack, card) for _ in range(3)} == {card.truth}
    assert pd(stack).metric("trtllm_mm_cache_encodes_total") == before
    assert pd(stack).metric("dynamo_component_embedding_cache_hits_total") == hits + 3


def test_a_burst_of_one_image_is_one_encode(stack: Stack) -> None:
    before = pd(stack).metric("trtllm_mm_cache_encodes_total")
    (card,) = cards(1, 4)
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: answer(stack, card), range(64)))
    assert len(set(answers)) == 1
    assert pd(stack).metric("trtllm_mm_cache_encodes_total") == before + 1


@pytest.mark.parametrize("requests", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_under_eviction_every_answer_is_true_and_the_capacity_holds(stack: Stack, requests: int) -> None:
    """Four times as many cards as there is room for, in an order that hits and evicts."""
    deck = known(stack, 4 * HELD_CARDS, 5)
    rng = random.Random(6)
    drawn = [deck[min(int(rng.expovariate(0.12)), len(deck) - 1)] for _ in range(requests)]
    evicted = pd(stack).metric("dynamo_component_embedding_cache_evictions_total")
    largest = 0.0
    with ThreadPoolExecutor(12) as threads:
        asking = [(card, threads.submit(answer, stack, card)) for card in drawn]
        for card, future in asking:
            assert future.result() == card.truth
            if rng.random() < 0.1:
                largest = max(largest, pd(stack).metric("dynamo_component_embedding_cache_current_bytes"))
    kept = pd(stack).metric("dynamo_component_embedding_cache_current_bytes")
    assert 0 < kept <= HELD_CARDS * ENTRY_BYTES
    assert largest <= HELD_CARDS * ENTRY_BYTES
    assert pd(stack).metric("dynamo_component_embedding_cache_evictions_total") > evicted


def test_requests_that_are_cancelled_leave_nothing(stack: Stack) -> None:
    deck = cards(24, 7)

    def leave(card: Card) -> None:
        stream = stack.client.chat.completions.create(
            model=stack.model,
            messages=[message(card.image, card.question)],
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            next(iter(stream))

    def hang_up(card: Card) -> None:
        with contextlib.suppress(openai.APITimeoutError):
            stack.client.with_options(timeout=0.01).chat.completions.create(
                model=stack.model, messages=[message(card.image, card.question)], max_tokens=48
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda pair: (leave if pair[0] % 2 else hang_up)(pair[1]), enumerate(deck)))
    worker = pd(stack)
    wait_until(
        lambda: all(
            worker.metric(f"trtllm_mm_cache_{name}") == 0
            for name in ("requests_in_flight", "reservations", "flights_in_progress", "leased_entries")
        ),
        30,
        "cancelled requests left something",
    )
    (card,) = known(stack, 1, 8)
    assert answer(stack, card) == card.truth


def test_when_enginecore_is_killed_the_worker_ends_by_name_and_serves_again(stack: Stack) -> None:
    (card,) = known(stack, 1, 9)
    before = pd(stack)
    core = next(each for each in engine_processes(stack) if "EngineCore" in each.name())
    core.kill()
    wait_until(lambda: not before.alive(), 10, "the PD worker did not end")
    assert "engine_lost" in before.log.read_text() or "EngineCore" in before.log.read_text()
    wait_until(
        lambda: (
            any(each.alive() and each.pid != before.pid for each in stack.workers("PD"))
            and "is ready again" in stack.log.read_text()
        ),
        READY_S,
        "no other PD worker came",
    )
    assert answer(stack, card) == card.truth


def test_nothing_outlives_the_script(tmp_path: Path) -> None:
    """Not EngineCore and not a worker of vLLM's, when `serve` is killed with no chance to say so."""
    with launched(
        tmp_path / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.001",
        script="agg_multimodal.sh",
        ready_timeout_s=READY_S,
    ) as stack:
        left = [psutil.Process(pd(stack).pid), *engine_processes(stack)]
        stack.launcher.kill()
        _, alive = psutil.wait_procs(left, timeout=30)
        for each in alive:
            each.kill()
        stack.launcher.wait()
        assert not alive


def test_after_a_restart_the_disk_answers_and_the_tower_does_not_run(tmp_path: Path) -> None:
    """Evicted to disk by the real engine, read back by another one: its own tower encodes nothing."""
    options = (
        "--multimodal-embedding-cache-capacity-gb",
        f"{2 * ENTRY_BYTES / 1024**3:.15f}",
        "--multimodal-embedding-cache-disk-path",
        str(tmp_path / "disk"),
        "--multimodal-embedding-cache-store-at-use",
        "1",
    )
    with launched(tmp_path / "first", *options, script="agg_multimodal.sh", ready_timeout_s=READY_S) as stack:
        deck = known(stack, 6, 10)
        wait_until(lambda: pd(stack).metric(STORED, outcome="stored") == 6, 60, "not all was stored")
        assert pd(stack).metric("trtllm_mm_cache_encodes_total") == 6
        assert pd(stack).metric("dynamo_component_embedding_cache_evictions_total") >= 4
        before = pd(stack).metric(FOUND, tier="disk", outcome="hit")
        assert [answer(stack, card) for card in deck] == [card.truth for card in deck]
        assert pd(stack).metric("trtllm_mm_cache_encodes_total") == 6, "what was evicted lies on disk"
        assert pd(stack).metric(FOUND, tier="disk", outcome="hit") > before
    with launched(
        tmp_path / "second", *options, script="agg_multimodal.sh", ready_timeout_s=READY_S
    ) as stack:
        assert [answer(stack, card) for card in deck] == [card.truth for card in deck]
        assert pd(stack).metric("trtllm_mm_cache_encodes_total") == 0
        assert pd(stack).metric(FOUND, tier="disk", outcome="hit") == len(deck)
        known(stack, 1, 11)
        assert pd(stack).metric("trtllm_mm_cache_encodes_total") == 1, "control: what the disk lacks"
