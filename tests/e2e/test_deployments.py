"""Other shapes of the stack: nothing retained, several PD workers, several encode workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.cards import Asked, Deal, Oracle
from tests.e2e.stack import Process, Stack, data_url, launched, new_image, png, wait_until
from trtllm_mm_cache.cli.ask import AskError, ask_server
from trtllm_mm_cache.settings import AskSettings

QUESTION = "What is this?"


def test_capacity_zero_serves_and_retains_nothing(tmp_path: Path, model_dir: Path, deal: Deal) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir)) as stack:
        (pd,) = stack.workers("PD")
        asked = deal()
        assert [stack.ask(*asked.parts) for _ in range(2)] == [asked.answer, asked.answer]
        assert pd.metric("trtllm_mm_cache_flights_total") == 2
        assert pd.metric("dynamo_component_embedding_cache_hits_total") == 0
        wait_until(
            lambda: pd.metric("dynamo_component_embedding_cache_entries") == 0, 5, "an embedding was retained"
        )
        assert stack.encodes() == 1, "the second read comes from the encode worker's arena"


def test_two_pd_workers_share_the_encode_workers_arena(tmp_path: Path, model_dir: Path, deal: Deal) -> None:
    capacity = ("--multimodal-embedding-cache-capacity-gb", "0.125")
    options = {"MODEL_PATH": str(model_dir), "PD_WORKERS": "2", "MM_CACHE_NO_RESTART": "1"}
    with launched(tmp_path / "run", *capacity, **options) as stack:
        asked = deal()
        flights = "trtllm_mm_cache_flights_total"

        def both_have_seen_it() -> bool:
            # Requests for one image go to one worker, until that has much more under way than the other.
            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda _: stack.ask(*asked.parts), range(16)))
            assert answers == [asked.answer] * 16
            return all(worker.metric(flights) == 1 for worker in stack.workers("PD"))

        wait_until(both_have_seen_it, 30, "one PD worker got no request")
        assert stack.encodes() == 1
        delivered = "trtllm_mm_cache_embeddings_total"
        assert stack.total("encode", delivered, origin="encoded") == 1
        # The second PD worker's miss found it there, or came while it was being encoded.
        assert sum(stack.total("encode", delivered, origin=origin) for origin in ("cached", "joined")) == 1
        the_other_pd_worker_goes_on(stack, asked)


def the_other_pd_worker_goes_on(stack: Stack, asked: Asked) -> None:
    """Kill one of two PD workers: the stack stays up, and serves as soon as the frontend knows."""
    victim = stack.workers("PD")[0]
    os.kill(victim.pid, signal.SIGKILL)

    def serves() -> bool:
        try:
            return stack.ask(*asked.parts) == asked.answer
        except openai.InternalServerError:
            return False

    wait_until(serves, 30, "the other PD worker did not take over")
    wait_until(lambda: "The other PD workers go on" in stack.log.read_text(), 10, "nothing was said")
    assert stack.launcher.poll() is None


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    """Two encode workers, and a PD worker that retains nothing, so that each request asks one of them."""
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        MODEL_PATH=str(model_dir),
        ENCODE_WORKERS="2",
        MM_CACHE_NO_RESTART="1",
    ) as running:
        yield running


def served_by(stack: Stack) -> dict[str, float]:
    """Return how many embeddings each live encode worker has delivered."""
    metric = "trtllm_mm_cache_embeddings_total"
    return {worker.name: worker.metric(metric) for worker in stack.workers("encode") if worker.alive()}


def test_a_key_goes_to_the_same_encode_worker_and_to_the_other_when_that_is_gone(
    two_encoders: Stack, deal: Deal
) -> None:
    stack = two_encoders
    (pd,) = stack.workers("PD")
    wait_until(lambda: pd.metric("trtllm_mm_cache_encode_workers") == 2, 10, "PD does not see both")
    cards: list[Asked] = []
    homes: list[str] = []
    while len(cards) < 8 or (len(set(homes)) < 2 and len(cards) < 24):
        asked = deal()
        cards.append(asked)
        before = served_by(stack)
        for _ in range(2):
            assert stack.ask(*asked.parts) == asked.answer
        gained = {name: count - before[name] for name, count in served_by(stack).items()}
        assert sorted(gained.values()) == [0, 2], "both requests for a picture must go to one worker"
        homes.append(max(gained, key=lambda name: gained[name]))
    assert len(set(homes)) == 2, f"the keys should have spread over both workers: {homes}"

    victim: Process = next(worker for worker in stack.workers("encode") if worker.name == homes[0])
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(lambda: not victim.alive(), 10, "the encode worker did not end")
    survivor = next(worker for worker in stack.workers("encode") if worker.name != victim.name)
    before_death = survivor.metric("trtllm_mm_cache_encodes_total")
    assert stack.ask(*cards[0].parts) == cards[0].answer
    assert survivor.metric("trtllm_mm_cache_encodes_total") == before_death + 1
    kept = homes.index(survivor.name)
    assert stack.ask(*cards[kept].parts) == cards[kept].answer
    assert survivor.metric("trtllm_mm_cache_encodes_total") == before_death + 1, "its own keys stay"


def test_without_any_encode_worker_text_and_cached_pictures_go_on(
    tmp_path: Path, model_dir: Path, deal: Deal, oracle: Oracle
) -> None:
    capacity = ("--multimodal-embedding-cache-capacity-gb", "0.125")
    options = {"MODEL_PATH": str(model_dir), "MM_CACHE_NO_RESTART": "1"}
    with launched(tmp_path / "run", *capacity, **options) as stack:
        cached = deal()
        assert stack.ask(*cached.parts) == cached.answer
        (encoder,) = stack.workers("encode")
        os.kill(encoder.pid, signal.SIGKILL)
        wait_until(lambda: not encoder.alive(), 10, "the encode worker did not end")
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as refused:
                stack.ask(new_image(), QUESTION)
            assert refused.value.status_code == 503
            assert stack.ask(*cached.parts) == cached.answer
            assert stack.ask("Hello there!") == oracle([], ["Hello there!"])
        with pytest.raises(AskError, match=r"503.*encode worker.*asking again in a moment"):
            ask_server([data_url(png(new_image()))], QUESTION, AskSettings(url=stack.url, max_tokens=1))
        said = "encode worker 1 was killed by SIGKILL and is not started again"
        wait_until(lambda: said in stack.log.read_text(), 10, "nothing was said")
