"""A PD worker of two ranks behind the whole stack: PD_RANKS=2."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import Stack, arenas_of, launched, message, new_image, wait_until
from tests.mpi.jobs import END_TIMEOUT_S, children_of, runs
from trtllm_mm_cache.settings import MB

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    """One encode worker and one PD worker of two ranks with a cache."""
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.125",
        MODEL_PATH=str(model_dir),
        PD_RANKS="2",
    ) as running:
        yield running


def test_answers_are_true_and_a_hit_encodes_nothing(two_ranks: Stack, deal: Deal) -> None:
    asked, swapped = deal.both_orders()
    for encodes in (2, 0):
        before = two_ranks.encodes()
        assert two_ranks.ask(*asked.parts) == asked.answer
        assert two_ranks.encodes() - before == encodes
    assert two_ranks.ask(*swapped.parts) == swapped.answer


def test_a_client_that_leaves_stops_both_ranks(two_ranks: Stack) -> None:
    stream = two_ranks.client.chat.completions.create(
        model=two_ranks.model,
        messages=[message(new_image(), QUESTION)],
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert next(stream)
    stream.close()
    started = time.monotonic()
    assert two_ranks.ask(new_image(), QUESTION, max_tokens=1)
    assert time.monotonic() - started < 10


def test_the_second_rank_has_no_memory_of_its_own(two_ranks: Stack) -> None:
    """It maps the arena of 128 MB; what it has not read it does not hold."""
    (worker,) = two_ranks.workers("PD")
    sizes = [_shared_bytes(pid) for pid in children_of(worker.pid)]
    assert sizes[0] > 128 * MB
    assert 0 < sizes[1] < 8 * MB


def test_when_the_launcher_is_killed_mpirun_and_its_ranks_end(tmp_path: Path, model_dir: Path) -> None:
    with launched(tmp_path / "run", MODEL_PATH=str(model_dir), PD_RANKS="2") as stack:
        (worker,) = stack.workers("PD")
        ranks = children_of(worker.pid)
        assert len(ranks) == 2
        stack.launcher.kill()
        gone = (worker.pid, *ranks)
        wait_until(lambda: not any(map(runs, gone)), END_TIMEOUT_S, "mpirun or a rank still runs")
    wait_until(lambda: not arenas_of(ranks), END_TIMEOUT_S, "shared memory was left behind")


def test_ctrl_c_drains_all_ranks(two_ranks: Stack) -> None:
    """Last: it takes the stack with it."""
    (worker,) = two_ranks.workers("PD")
    ranks = children_of(worker.pid)
    assert two_ranks.stop() == 130
    wait_until(lambda: not any(map(runs, ranks)), END_TIMEOUT_S, "a rank still runs")
    log = worker.log.read_text()
    assert "SIGUSR1: draining" in log
    assert "PD worker ended" in log
    assert "gone" not in log
    assert "Traceback" not in log


def _shared_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem:"))
