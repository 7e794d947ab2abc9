"""Waiting for something that happens elsewhere, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], *, deadline_s: float) -> None:
    """Look at `condition` until it holds; fail after `deadline_s` seconds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} seconds"
        time.sleep(0.01)
