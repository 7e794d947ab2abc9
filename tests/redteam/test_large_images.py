"""Large images, all at once: hits and text go on, and no worker takes more memory than operations.md says.

The short run sends 100 images of 2 MiB, as many at once as there are clients; the long one is 60 clients with
11 MiB each, for twelve seconds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.questions import MODEL
from tests.chaos.stack import ChaosStack, chaos_stack, wait_until_serving
from tests.e2e.stack import wait_until
from tests.redteam.large_images import LargeImages, PeakMemory
from trtllm_mm_cache.settings import MB

REQUEST_MEMORY_MB, INCOMING_MB, WAITING_MB, PREPARED_MB = 96, 16, 16, 8
ENCODE_TIMEOUT_S = 15
NOISE_MB = 48
"""What a process takes besides under load: threads, the engine's activations, what is about to be freed."""


@contextmanager
def serving(folder: Path) -> Iterator[ChaosStack]:
    """A stack with small budgets."""
    with chaos_stack(
        folder,
        1,
        1,
        None,
        frontend=("--request-memory-mb", str(REQUEST_MEMORY_MB)),
        pd=(
            *("--max-incoming-image-mb", str(INCOMING_MB), "--max-waiting-image-mb", str(WAITING_MB)),
            *("--encode-timeout-s", str(ENCODE_TIMEOUT_S)),
        ),
        encode=("--max-waiting-image-mb", str(WAITING_MB), "--max-prepared-mb", str(PREPARED_MB)),
    ) as stack:
        wait_until_serving(stack)
        yield stack


def pd_budget_mb(file_mb: float) -> float:
    """The PD worker's, beyond what it has when it is warm, as docs/operations.md states it."""
    arriving = 2 * REQUEST_MEMORY_MB / 3
    sending = 2 * 4 * file_mb
    return 2 * INCOMING_MB + max(WAITING_MB, file_mb) + arriving + sending


def encode_budget_mb(file_mb: float, side: int, threads: int = 2) -> float:
    """The encode worker's, in the same way."""
    preparing = threads * (12 * side * side / MB + 1)
    arriving = 2 * 4 * file_mb
    return max(WAITING_MB, file_mb) + PREPARED_MB + preparing + arriving


@pytest.mark.parametrize(
    ("clients", "side", "requests", "seconds"),
    [
        pytest.param(25, 836, 100, 0.0, id="short"),
        pytest.param(60, 1960, 0, 12.0, id="long", marks=pytest.mark.long),
    ],
)
def test_large_images_take_down_neither_hits_nor_text_nor_the_budget(
    tmp_path: Path, clients: int, side: int, requests: int, seconds: float
) -> None:
    with serving(tmp_path / "stack") as stack:
        load = LargeImages(stack.url, MODEL.name, side)
        load.warm()
        pd, encode = stack.pd_workers[0].popen.pid, stack.encode_workers[0].popen.pid
        until = time.monotonic() + seconds
        with PeakMemory([pd, encode]) as memory:
            load.run(clients, lambda done: done < requests or time.monotonic() < until)
        load.warm()
    print(load.outcomes, {name: memory.grown(pid) / MB for name, pid in (("pd", pd), ("encode", encode))})
    assert load.outcomes["large"].keys() <= {200, 503}
    assert load.outcomes["large"][200] > 0
    assert load.outcomes["hit"].keys() == load.outcomes["text"].keys() == {200}
    file_mb = load.file_bytes / MB
    assert memory.grown(pd) / MB < pd_budget_mb(file_mb) + NOISE_MB
    assert memory.grown(encode) / MB < encode_budget_mb(file_mb, side) + NOISE_MB


def test_100_misses_that_cannot_be_encoded_take_no_more_than_the_budget(tmp_path: Path) -> None:
    """The encode worker stands still, so that whatever the PD worker takes on stays with it."""
    with serving(tmp_path / "stack") as stack:
        load = LargeImages(stack.url, MODEL.name, 1400)
        load.warm()
        pd, encode = stack.pd_workers[0], stack.encode_workers[0]
        encode.signal(signal.SIGSTOP)
        most = dict.fromkeys(("incoming_image_bytes", "waiting_image_bytes"), 0.0)
        with PeakMemory([pd.popen.pid]) as memory, ThreadPoolExecutor(1) as thread:
            running = thread.submit(load.run, 100, lambda done: done == 0)
            while wait([running], timeout=0.05).not_done:
                for name, nbytes in most.items():
                    most[name] = max(nbytes, pd.process.metric(f"trtllm_mm_cache_{name}"))
            running.result()
        encode.signal(signal.SIGCONT)
        wait_until(lambda: pd.process.metric("trtllm_mm_cache_waiting_image_bytes") == 0, 30, "images wait")
    print(load.outcomes, memory.grown(pd.popen.pid) / MB, most)
    assert 0 < most["waiting_image_bytes"] <= WAITING_MB * MB
    assert most["incoming_image_bytes"] <= INCOMING_MB * MB
    assert load.outcomes["large"].keys() == {503}
    assert load.outcomes["hit"].keys() == load.outcomes["text"].keys() == {200}
    assert memory.grown(pd.popen.pid) / MB < pd_budget_mb(load.file_bytes / MB) + NOISE_MB
