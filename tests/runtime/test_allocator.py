"""What the allocator keeps of freed memory, in processes that allocate as a worker does."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHURN = """
import ctypes, sys, threading
from trtllm_mm_cache.observability.memory import MemoryCollector
from trtllm_mm_cache.runtime.allocator import bound_heaps
if sys.argv[1] == "bounded":
    bound_heaps()

def work(number):
    kept.extend(bytes(3000) for _ in range(50))
    for _ in range(6):
        large = [bytearray(size * 1024 * 1024) for size in (11, 3, 7, 11)]
        kept.extend(bytes(3000) for _ in range(5))
        del large

kept = []
for _ in range(2):
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
(family,) = MemoryCollector().collect()
values = {sample.labels["kind"]: sample.value for sample in family.samples}
print(int(values["heap_free"]), int(values["heap_used"]), int(values["anonymous"]))
"""


KEPT = 16 * 1024**2
"""Between what is free with the bounds (0.2 MB) and without (272 MB)."""


def churned(how: str) -> tuple[int, int, int]:
    command = [sys.executable, "-c", CHURN, how]
    free, used, anonymous = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    return int(free), int(used), int(anonymous)


def test_freed_buffers_of_images_are_given_back() -> None:
    free, used, anonymous = churned("bounded")
    assert free < KEPT
    assert 0 < used < anonymous + free


@pytest.mark.parametrize(
    "variable", ["MALLOC_MMAP_THRESHOLD_=33554432", "GLIBC_TUNABLES=glibc.malloc.mmap_threshold=33554432"]
)
def test_what_the_operator_sets_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With such a threshold large buffers come from the heaps, which keep them."""
    monkeypatch.setenv(*variable.split("=", 1))
    assert churned("bounded")[0] > KEPT
