"""Imports of thousands of modules, as an engine's package makes them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector out of the imports in this block; for one thread at a time.

    Imports make millions of objects and next to no garbage: looking for it took a fifth of the time of
    importing torch and transformers.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
