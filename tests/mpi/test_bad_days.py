"""Ranks that die, jobs that are ended, starts that cannot work."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import STOP_TIMEOUT_S, wait_until
from tests.mpi.jobs import END_TIMEOUT_S, START_TIMEOUT_S, Job, mpirun, runs
from tests.mpi.scenarios import shared_mappings
from tools.tiny_models import make_tiny_model

SERVES = "PD worker ready"


@contextlib.contextmanager
def running(count: int, folder: Path, arguments: list[str]) -> Iterator[list[Job]]:
    """Start so many jobs of two ranks at once."""
    with contextlib.ExitStack() as jobs:
        started = []
        for number in range(count):
            own = folder / f"job-{number}"
            own.mkdir()
            variables = {"DYN_FILE_KV": str(own / "discovery")}
            started.append(jobs.enter_context(mpirun(2, own, *arguments, **variables)))
        yield started


@pytest.fixture
def worker(folder: Path, small_model: Path) -> Iterator[Job]:
    """One idle PD worker of two ranks."""
    with running(1, folder, pd(folder, small_model)) as (job,):
        job.wait_for(SERVES)
        yield job


def pd(folder: Path, model_dir: Path) -> list[str]:
    """Return the arguments of a PD worker."""
    options = {
        "--model-path": str(model_dir),
        "--extra-engine-args": str(folder / "pd.yaml"),
        "--transfer-arena-mb": "8",
        "--multimodal-embedding-cache-capacity-gb": "0.03125",
    }
    return ["-m", "trtllm_mm_cache.cli", "pd", *(part for option in options.items() for part in option)]


def talk(folder: Path, model_dir: Path) -> list[str]:
    """Return the arguments of a generator that never stops to answer."""
    return ["-m", "tests.mpi.job", "talk", str(model_dir), str(folder)]


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def arenas(pids: list[int]) -> set[str]:
    """Return the files of the arenas that these processes map."""
    return {file for pid in pids for _, file in shared_mappings(pid)}


def assert_nothing_left(pids: list[int], files: set[str]) -> None:
    """No rank runs, and torch's helper has removed the arenas."""
    wait_until(lambda: not any(map(runs, pids)), END_TIMEOUT_S, "a rank was left behind")
    wait_until(lambda: not any(map(os.path.exists, files)), END_TIMEOUT_S, "an arena was left behind")


@pytest.mark.parametrize(("arguments", "state"), [(pd, SERVES), (talk, "busy")], ids=["idle", "in-an-answer"])
def test_a_killed_rank_ends_the_worker(
    arguments: Callable[[Path, Path], list[str]], state: str, folder: Path, small_model: Path
) -> None:
    with running(2, folder, arguments(folder, small_model)) as jobs:
        for victim, job in enumerate(jobs):
            job.wait_for(state)
            pids = job.ranks()
            files = arenas(pids)
            assert len(pids) == 2
            assert files
            os.kill(pids[victim], signal.SIGKILL)
            assert job.wait_ended(END_TIMEOUT_S) != 0
            assert_nothing_left(pids, files)
            said = [line for line in job.output.splitlines() if "all ranks of the PD worker end" in line]
            assert len(said) <= 1, job.output
            # mpirun ends the other rank once it has noticed, which may be before that rank has.
            named = said[0] if said else job.output
            assert f"rank {victim} is gone" in named or f"process rank {victim} with" in named, job.output
            assert "Traceback" not in job.output


def test_a_rank_that_waits_burns_no_core_and_ctrl_c_ends_all_ranks(worker: Job) -> None:
    """mpirun kills its ranks half a second after SIGINT, drained or not."""
    pids = worker.ranks()
    files = arenas(pids)
    before, started = cpu_seconds(pids[1]), time.monotonic()
    wait_until(lambda: time.monotonic() > started + 1, 5, "time stands still")
    assert cpu_seconds(pids[1]) - before < 0.1
    worker.process.send_signal(signal.SIGINT)
    assert worker.wait_ended(END_TIMEOUT_S) != 0
    assert_nothing_left(pids, files)


def test_ranks_do_not_outlive_mpirun(worker: Job) -> None:
    """What they say then nobody can read: it went through mpirun."""
    pids = worker.ranks()
    files = arenas(pids)
    worker.process.kill()
    worker.process.wait(END_TIMEOUT_S)
    assert_nothing_left(pids, files)


def test_sigusr1_drains(worker: Job) -> None:
    pids = worker.ranks()
    files = arenas(pids)
    worker.process.send_signal(signal.SIGUSR1)
    assert worker.wait_ended(STOP_TIMEOUT_S) == 0, worker.output
    assert_nothing_left(pids, files)
    assert "PD worker ended" in worker.output
    assert "gone" not in worker.output
    assert "Traceback" not in worker.output


def test_a_model_that_cannot_be_spread_is_named_once(folder: Path) -> None:
    model_dir = make_tiny_model("qwen3_vl", folder / "model")
    with mpirun(2, folder, *pd(folder, model_dir), DYN_FILE_KV=str(folder / "discovery")) as job:
        assert job.wait_ended(START_TIMEOUT_S) == 2
    errors = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.output
    # transformers 5.23 has no plan for it; 5.24 has one that does not take effect.
    assert re.search("no tensor-parallel plan for .* qwen3_vl|did not spread .* over the ranks", errors[0])
    assert "Traceback" not in job.output
    assert "gone" not in job.output


def test_ranks_on_two_nodes_are_refused(folder: Path, small_model: Path) -> None:
    with mpirun(2, folder, "-m", "tests.mpi.job", "two-nodes", str(small_model), str(folder)) as job:
        assert job.wait_ended(START_TIMEOUT_S) != 0
    assert "the ranks are on the nodes node-0, node-1" in job.output
    assert "use the trtllm engine, which spans nodes" in job.output
