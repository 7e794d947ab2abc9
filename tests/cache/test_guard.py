"""A finalizer may run between any two bytecodes of a cache operation, and may release leases there.

In a process of its own, since a deadlock cannot be undone. What runs in the middle is a trace function, at
one bytecode after the other; Python 3.12 runs the garbage collector, and with it finalizers, in such places.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager

manager = MultimodalEmbeddingCacheManager(4096)
manager.set("a", CachedEmbedding(torch.ones(8)))

def release_after(count):
    "Release a lease after so many bytecodes of an operation; say whether it has as many."
    lease = manager.lease("a")

    def trace(frame, event, argument):
        nonlocal count
        if "/trtllm_mm_cache/cache/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count -= event == "opcode"
        if count == 0:
            lease.release()
        return trace

    sys._getframe().f_trace_opcodes = True  # 3.12 wants to know before the tracing starts
    sys.settrace(trace)
    manager.peek("a")
    sys.settrace(None)
    released = lease.released
    lease.release()
    return released

count = 1
while release_after(count):
    count += 1
assert count > 50, count
assert manager.statistics().leased_entries == 0
manager.check_integrity()
print("done")
"""


def test_a_lease_released_by_a_finalizer_inside_an_operation_does_not_wait_for_itself() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "done\n", ended.stderr
