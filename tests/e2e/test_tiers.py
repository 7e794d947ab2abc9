"""Everything is stopped and started again: the same questions cost no encode and get the right answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.questions import MAX_TOKENS, MODEL, Question, make_questions
from tests.e2e.stack import Stack, launched, wait_until
from tests.e2e.test_operations import command
from tests.tiers.bench import redis_running

DISK, CAPACITY = "--multimodal-embedding-cache-disk-path", "--multimodal-embedding-cache-capacity-gb"
STORED = "trtllm_mm_cache_tier_offers_total"
HITS = "trtllm_mm_cache_tier_lookups_total"
ENTRIES = "dynamo_component_embedding_cache_entries"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Six, each about cards of its own."""
    rng = random.Random(11)
    return [question for question in make_questions(rng, scenes=40, questions=6) if question.pictures]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("s" * 64)
    file.chmod(0o600)
    return file


def ask_all(stack: Stack, questions: list[Question], *, times: int = 1) -> None:
    for question in questions:
        for _ in range(times):
            answer: Any = stack.client.chat.completions.create(
                model=stack.model, messages=[question.message], max_tokens=MAX_TOKENS, temperature=0
            )
            assert answer.choices[0].message.content == question.answer


def images(questions: list[Question]) -> int:
    return len({part["image_url"]["url"] for each in questions for part in each.message["content"][:-1]})


def stored(stack: Stack, kind: str, count: int) -> None:
    """Wait until as many entries have been stored."""
    wait_until(lambda: stack.total(kind, STORED, outcome="stored") == count, 30, "not all was stored")


def test_a_restart_from_disk(tmp_path: Path, questions: list[Question]) -> None:
    options = (CAPACITY, "0.03", DISK, str(tmp_path / "disk"))
    with launched(tmp_path / "first", *options, MODEL_PATH=str(MODEL)) as stack:
        ask_all(stack, questions, times=2)
        count = images(questions)
        stored(stack, "PD", count)
        assert stack.encodes() == count
    with launched(tmp_path / "second", *options, MODEL_PATH=str(MODEL)) as stack:
        ask_all(stack, questions)
        assert stack.encodes() == 0
        assert stack.total("PD", HITS, tier="disk", outcome="hit") == count
        done = command(stack, "drop", "--all")
        assert done.returncode == 0, done.stderr
        assert f"{count} on disk or in the store" in done.stdout
        assert [path for path in (tmp_path / "disk").rglob("*") if len(path.name) == 64] == []
        ask_all(stack, questions)
        assert stack.encodes() == count


def test_two_workers_share_a_store_and_a_drop_reaches_both(
    tmp_path: Path, questions: list[Question], secret: Path
) -> None:
    with redis_running() as (port, _):
        variables = {
            "MODEL_PATH": str(MODEL),
            "MM_CACHE_STORE_URL": f"redis://127.0.0.1:{port}/0",
            "MM_CACHE_ENTRIES_SECRET_FILE": str(secret),
        }
        with launched(tmp_path / "first", CAPACITY, "0.03", **variables) as stack:
            ask_all(stack, questions, times=2)
            stored(stack, "PD", images(questions))
        with launched(tmp_path / "second", CAPACITY, "0.03", PD_WORKERS="2", **variables) as stack:
            ask_all(stack, questions)
            assert stack.encodes() == 0
            done = command(stack, "drop", "--all")
            assert done.returncode == 0, done.stderr
            assert stack.total("PD", ENTRIES) + stack.total("encode", ENTRIES) == 0
            ask_all(stack, questions)
            assert stack.encodes() == images(questions), "nothing came back from the store"
