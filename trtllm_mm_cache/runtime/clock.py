"""A system clock that is set anew must take no worker off discovery's list.

Dynamo's discovery by files (1.6.1) judges by the system's clock: each process renews the times of its own
files every 3 seconds, and removes every file that is older than 10. A clock that is set forward makes all
files old at once, and the first process to look removes those of all others; set back, it keeps dead workers'
files for as long as it went back. So each process watches the clock, and renews all files when it has been
set: the living go on renewing theirs, and the dead's expire as always.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_STEP_S = 1.0


def watch_clock(folder: Path) -> None:
    """Begin to renew the files below `folder` whenever the system's clock is set, until the process ends."""
    threading.Thread(target=_watch, args=(folder,), name="clock", daemon=True).start()


def _watch(folder: Path) -> None:
    before = time.time() - time.monotonic()
    while True:
        # A wait by the kernel's own count of time: a thread's lock may count by the clock that is set.
        select.select((), (), (), _LOOK_S)
        now = time.time() - time.monotonic()
        if abs(now - before) > _STEP_S:
            _renew(folder)
            logger.warning("the system's clock was set by %+.0f s", now - before)
        before = now


def _renew(folder: Path) -> None:
    for path in folder.rglob("*"):
        with suppress(OSError):  # it has just gone
            os.utime(path, (time.time(), time.time()))
