"""Logging of a worker process: one format, to standard error."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Send this package's log lines at `level` and above to standard error. Call once, at start.

    Third-party libraries are held to WARNING: their INFO lines may carry URLs of requests.
    """
    logging.basicConfig(level=logging.WARNING, format=_FORMAT, force=True)
    logging.getLogger("trtllm_mm_cache").setLevel(level)
