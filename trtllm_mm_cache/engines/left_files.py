"""Files that an engine's processes leave: removed at its end, and written down lest all are killed.

Engines make sockets in the temporary folder, and shared memory by `multiprocessing.shared_memory`: vLLM for
its broadcasts, 160 MiB for one, sparse. Python's resource tracker unlinks that memory when the last process
that had it is gone, unless a supervisor has killed the tracker with the others.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from trtllm_mm_cache.cache.arena.leftovers import SHARED_MEMORY_ROOT, own_register

logger = logging.getLogger(__name__)

_MAPPED = re.compile(rf"{SHARED_MEMORY_ROOT}/(psm_[0-9a-f]+)$", re.MULTILINE)


def files_made() -> frozenset[Path]:
    """Return the files that this process, and those that it started, have made and have open.

    Of an engine's are those that are new when it runs. Blocking, milliseconds.
    """
    files: set[Path] = set()
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            files.update(_sockets(process), _shared_memory(process))
        except (psutil.Error, OSError):  # it has ended
            continue
    return frozenset(files)


def write_down(files: Iterable[Path]) -> None:
    """Have the next start remove them, if this process is killed: see `remove_leftovers`."""
    try:
        for file in sorted(files):
            own_register.add(file)
    except OSError as error:
        logger.warning("what the engine leaves when it is killed cannot be written down: %s", error.strerror)


def remove_files(files: Iterable[Path]) -> None:
    """Remove what is left of them, when the engine's processes have ended."""
    for file in files:
        file.unlink(missing_ok=True)


def _sockets(process: psutil.Process) -> Iterator[Path]:
    """Yield the files of a process's sockets; of those that it was given elsewhere none is there."""
    folder = Path(tempfile.gettempdir())
    for connection in process.net_connections("unix"):
        path = Path(str(connection.laddr))  # "" where it has none
        if path.parent == folder:
            yield path


def _shared_memory(process: psutil.Process) -> Iterator[Path]:
    for name in _MAPPED.findall(Path(f"/proc/{process.pid}/maps").read_text()):
        yield SHARED_MEMORY_ROOT / name
