"""Large pages where the mount gives them; where it does not, the start says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
mount -t tmpfs -o size=300m,huge={huge} tmpfs /dev/shm && exec "$0" -c '
import logging
logging.basicConfig(format="%(message)s", level=logging.INFO)
from trtllm_mm_cache.cache.arena.large_pages import report_large_pages
from trtllm_mm_cache.cache.arena.arena import Arena
from trtllm_mm_cache.cache.arena.region import HEADER_BYTES
arena = Arena(128 * 1024**2)
print(report_large_pages(arena.base_address - HEADER_BYTES, arena.capacity_bytes + HEADER_BYTES))
'
"""


def arena_in(huge: str) -> tuple[float, str]:
    """Make an arena in a file system of that kind; return its share of large pages, and the log."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a mount namespace")
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", PROGRAM.format(huge=huge), sys.executable],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "mount:" in result.stderr:
        pytest.skip("this kernel has no large pages for shared memory")
    return float(result.stdout), result.stderr


def test_without_them_the_start_says_how_to_get_them() -> None:
    share, log = arena_in("never")
    assert share < 0.5  # 0, but where the kernel has by chance chosen an address that suits them
    assert "huge=within_size /dev/shm" in log


@pytest.mark.parametrize("huge", ["always", "within_size", "advise"])
def test_where_the_mount_gives_them_the_arena_has_them(huge: str) -> None:
    share, log = arena_in(huge)
    assert share > 0.9
    assert "small pages" not in log
