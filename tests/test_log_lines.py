"""Text log lines: what a client sent may stand in one, and never begins another."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import logging
from trtllm_mm_cache.observability.logs import configure_logging
configure_logging("INFO", "text")
try:
    raise ValueError("the engine's own\\ntwo lines")
except ValueError:
    logging.getLogger("trtllm_mm_cache").info("%s", "a\\n2026-01-01 ERROR forged\\r\\x1b[2Jé", exc_info=True)
"""


def test_a_message_is_one_line_and_a_traceback_stays_readable() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, *rest = ended.stderr.splitlines()
    assert first.endswith(r"trtllm_mm_cache: a\n2026-01-01 ERROR forged\r\x1b[2Jé")
    assert rest[0].startswith("Traceback")
    assert "two lines" in rest[-1]
