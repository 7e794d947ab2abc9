"""What this process holds of anonymous memory, and how much of that its allocator has free."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trtllm_mm_cache.observability.metrics import samples

_STATUS = Path("/proc/self/status")


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: bytes, over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


class MemoryCollector(Collector):
    """Yields a process's anonymous memory, and where glibc's allocator tells (2.33 and newer), the heap's.

    `anonymous` is resident and backed by no file; shared memory does not count. `heap_used` is what the
    program has allocated, `heap_free` what it has freed and the allocator keeps. Growth of the first alone is
    fragmentation or another allocator, growth of the second something that is kept. Any thread.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._mallinfo = getattr(libc, "mallinfo2", None)
        if self._mallinfo is not None:
            self._mallinfo.restype = _MallInfo

    def collect(self) -> Iterable[Metric]:
        """Yield one gauge by kind."""
        values = {}
        if (found := re.search(r"RssAnon:\s+(\d+) kB", _STATUS.read_text())) is not None:
            values["anonymous"] = int(found[1]) * 1024
        if self._mallinfo is not None:
            info = self._mallinfo()
            values |= {"heap_used": info.uordblks + info.hblkhd, "heap_free": info.fordblks}
        yield samples(
            GaugeMetricFamily,
            "memory_bytes",
            "Memory of the process, without shared memory.",
            [({"kind": kind}, nbytes) for kind, nbytes in values.items()],
        )
