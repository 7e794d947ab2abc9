"""glibc's allocator, told to give back what a server of large images frees.

By itself it keeps most of it. A freed buffer of 11 MB makes it serve buffers of that size from its heaps
from then on (its threshold for `mmap` follows what is freed, up to 32 MB), where small allocations that live
longer soon lie between them; and each thread gets a heap of its own, up to eight a core, that no other uses.
Over hours of mixed requests that looks like a leak: anonymous memory grows while what the program has
allocated does not.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_LARGE_BYTES = 1024 * 1024
"""From here on an allocation is a mapping of its own, given back when it is freed: 0.2 ms a megabyte."""

_ARENAS = 4
"""Heaps of all threads together. Those that allocate much are few: event loop, media, engine, Dynamo's."""


def bound_heaps() -> None:
    """Set the allocator up for this process; call it first, before there are threads.

    What the operator's environment sets (`MALLOC_…`, `GLIBC_TUNABLES`) stays. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    settings = {
        "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, _LARGE_BYTES),
        "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES),
        "MALLOC_ARENA_MAX": (_M_ARENA_MAX, _ARENAS),
    }
    for variable, (parameter, value) in settings.items():
        if variable not in os.environ:
            mallopt(parameter, value)
