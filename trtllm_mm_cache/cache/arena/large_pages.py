"""Whether an arena lies in large pages, and what an operator can do for it.

A READ by NIXL over shared memory pins the exporter's pages one by one, so with pages of 2 MiB it takes about
a third less. Whether the shared-memory file system has them is decided by its mount: `huge=always` and
`huge=within_size` give them as the arena is committed, `huge=advise` where a mapping asks, and `huge=never`,
the default, not at all.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_LARGE_PAGE = 2 * 1024**2
_WORTH_SAYING_BYTES = 64 * 1024**2


def ask_for_large_pages(start: int, nbytes: int) -> None:
    """Ask for large pages for a mapping of shared memory, before it is populated; a refusal is no error."""
    _libc.madvise(start, nbytes, _MADV_HUGEPAGE)


def report_large_pages(start: int, nbytes: int) -> float:
    """Return the share of a populated mapping that lies in large pages; the log has it where that is little.

    What was committed in small pages, as with `huge=advise`, is brought together first, where the mapping's
    address allows it.
    """
    share = _share(start, nbytes)
    if share < 0.5 and start % _LARGE_PAGE == 0 and nbytes >= _LARGE_PAGE:
        _libc.madvise(start, nbytes // _LARGE_PAGE * _LARGE_PAGE, _MADV_COLLAPSE)
        share = _share(start, nbytes)
    if share < 0.5 and nbytes >= _WORTH_SAYING_BYTES:
        logger.info(
            "the arena of %d MiB lies in small pages, %.0f %% of it in large ones: transfers by NIXL on one "
            "machine are faster with `mount -o remount,huge=within_size /dev/shm`",
            nbytes // 1024**2,
            100 * share,
        )
    return share


def _share(start: int, nbytes: int) -> float:
    """Return the share of the mapping that begins at `start` and is mapped by large pages."""
    beginning = f"{start:x}-"
    inside = False
    try:
        with Path("/proc/self/smaps").open() as lines:
            for line in lines:
                if line.startswith(beginning):
                    inside = True
                elif inside and line.startswith("ShmemPmdMapped:"):
                    return int(line.split()[1]) * 1024 / nbytes
    except OSError as error:
        logger.debug("the pages of the arena cannot be looked at: %s", error.strerror)
    return 0.0
