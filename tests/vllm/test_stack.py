"""The product page's command with vLLM: true answers through encode worker, NIXL and arena."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from PIL import Image

from tests.e2e.cards import Deal
from tests.e2e.conftest import generate_answer
from tests.e2e.stack import Stack, launched, wait_until
from tests.engines.contract import chat_case
from tests.services import files_that_outlive
from tests.vllm.models import CARD, DEMO

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # engines are started, some twice

QUESTION = "Where is the yellow cross?"
READY_S = 300


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    capacity = ("--multimodal-embedding-cache-capacity-gb", "0.0001")  # about twenty cards
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        *capacity,
        script="disagg_multimodal_e_pd.sh",
        ready_timeout_s=READY_S,
    ) as running:
        yield running


def cards() -> tuple[Image.Image, Image.Image]:
    card = Image.open(CARD).convert("RGB")
    return card, card.transpose(Image.Transpose.ROTATE_180)


def test_misses_and_hits_are_answered_truly(stack: Stack) -> None:
    before = stack.encodes()
    for _ in range(2):
        for card, place in zip(cards(), ("top right", "bottom left"), strict=True):
            assert stack.ask(card, QUESTION) == place
    assert stack.encodes() - before == 2
    assert stack.total("PD", "dynamo_component_embedding_cache_hits_total") == 2


def test_a_burst_of_one_image_is_one_encode(stack: Stack) -> None:
    card = Image.open(CARD).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    before = stack.encodes()
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: stack.ask(card, QUESTION), range(64)))
    assert set(answers) == {"top left"}
    assert stack.encodes() - before == 1


@pytest.mark.long
def test_two_thousand_answers_are_true_while_entries_are_evicted(stack: Stack) -> None:
    """Sixty cards through a cache of about twenty, eight clients: nobody gets another card's answer."""

    def oracle(images: Sequence[Image.Image], texts: Sequence[str], max_tokens: int = 8) -> str:
        return generate_answer(chat_case(DEMO, list(images), texts), max_tokens)

    deal, order = Deal(oracle, seed=20261127), random.Random(5)
    cards = [deal() for _ in range(60)]
    asked = [order.choice(cards) for _ in range(2000)]
    evicted = stack.total("PD", "dynamo_component_embedding_cache_evictions_total")
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda card: stack.ask(*card.parts, max_tokens=16), asked))
    wrong = [
        (card.text, card.answer, answer)
        for card, answer in zip(asked, answers, strict=True)
        if card.answer != answer
    ]
    assert not wrong
    assert stack.total("PD", "dynamo_component_embedding_cache_evictions_total") - evicted > 100


def test_log_probabilities_and_penalties_are_served(stack: Stack) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = stack.client.chat.completions.create(
        model=stack.model,
        messages=asked,  # type: ignore[arg-type]
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.5,
        seed=7,
        temperature=1.0,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(len(place.top_logprobs) == 3 for place in logprobs.content)


def test_several_choices_reach_the_client_each_with_its_own_end(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model=stack.model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=6,
        n=3,
        temperature=1.5,
        seed=11,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert len({choice.message.content for choice in answer.choices}) > 1, "each is drawn for itself"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18


def engine_processes(stack: Stack) -> dict[str, psutil.Process]:
    """Return vLLM's processes below the PD worker: EngineCore and one worker."""
    (pd,) = [worker for worker in stack.workers("PD") if worker.alive()]
    found = {}
    for process in psutil.Process(pd.pid).children(recursive=True):
        for name in ("EngineCore", "Worker"):
            if f"VLLM::{name}" in " ".join(process.cmdline()):
                found[name] = process
    return found


def test_an_encode_worker_that_is_killed_costs_misses_alone_until_it_is_back(stack: Stack) -> None:
    known, unknown = cards()[0], Image.open(CARD).convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert stack.ask(known, QUESTION) == "top right"
    (worker,) = stack.workers("encode")
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(5):
        assert stack.ask(known, QUESTION) == "top right", "a hit needs no encode worker"

    def answer() -> str:
        try:
            return stack.ask(unknown, QUESTION)
        except openai.APIStatusError as error:
            if error.status_code != 503:
                raise
            return ""

    wait_until(answer, 120, "no encode worker came back")
    assert answer() == "bottom right"
    assert any(each.alive() and each.pid != worker.pid for each in stack.workers("encode"))


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_a_process_of_vllms_that_dies_ends_the_pd_worker(stack: Stack, victim: str) -> None:
    """With a named error and another status than 0, within 5 s; `serve` starts another one."""
    assert stack.ask(cards()[0], QUESTION) == "top right"
    processes = engine_processes(stack)
    assert set(processes) == {"EngineCore", "Worker"}
    (pd,) = [worker for worker in stack.workers("PD") if worker.alive()]
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(
            stack.ask, "Tell a long story", max_tokens=1500, extra_body={"ignore_eos": True}
        )
        wait_until(lambda: stack.total("PD", "trtllm_mm_cache_requests_in_flight") == 1, 30, "no request ran")
        processes[victim].kill()
        killed = time.monotonic()
        wait_until(lambda: not pd.alive(), 60, "the PD worker did not end")
        took = time.monotonic() - killed
        with pytest.raises(openai.APIError):
            long.result()
    print(f"{victim}: the PD worker ended after {took:.1f} s")
    text = pd.log.read_text()
    assert "vLLM's EngineCore or one of its workers has ended" in text
    wait_until(lambda: not any(map(_runs, processes.values())), 30, "something of vLLM was left")
    wait_until(
        lambda: any(worker.alive() and worker.pid != pd.pid for worker in stack.workers("PD")), 60, "no other"
    )
    wait_until(lambda: _serves(stack), READY_S, "the new PD worker did not serve")
    assert stack.ask(cards()[1], QUESTION) == "bottom left"


def test_nothing_is_left_of_a_pd_worker_that_is_killed(stack: Stack) -> None:
    wait_until(lambda: _serves(stack), READY_S, "no PD worker serves")
    processes = engine_processes(stack)
    assert set(processes) == {"EngineCore", "Worker"}
    (pd,) = [worker for worker in stack.workers("PD") if worker.alive()]
    files = files_that_outlive(pd.pid)
    assert any(file.is_socket() for file in files)
    assert any(file.name.startswith("psm_") for file in files)
    os.kill(pd.pid, signal.SIGKILL)
    wait_until(
        lambda: not any(_runs(process) for process in processes.values()), 30, "vLLM outlived its PD worker"
    )
    wait_until(lambda: _serves(stack), READY_S, "the new PD worker did not serve")
    assert [file for file in files if file.exists()] == [], "the next start removes them"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _serves(stack: Stack) -> bool:
    try:
        return bool(stack.ask("Hello", max_tokens=1))
    except openai.APIError:
        time.sleep(0.5)
        return False
