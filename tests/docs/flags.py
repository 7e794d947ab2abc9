"""The flags of the command line and of this repository's scripts, by asking or reading them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

from tests.docs.documents import ROOT, tracked_paths

ROLES = ("serve", "frontend", "encode", "pd", "ask", "drop", "plan")


@cache
def role_flags(role: str) -> frozenset[str]:
    """Return the flags that `trtllm-mm-cache ROLE --help` names."""
    text = subprocess.run(
        [sys.executable, "-m", "trtllm_mm_cache.cli", role, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", text)) | {"--help"}


@cache
def script_flags() -> frozenset[str]:
    """Return the flags that the scripts of this repository add to a parser, or know as words."""
    folders = ("benchmarks", "launch", "tests", "tools")
    paths = [path for path in tracked_paths() if path.parts[:1] and path.parts[0] in folders]
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in paths if path.suffix in (".py", ".sh")]
    return frozenset(
        flag for text in texts for flag in re.findall(r"""["' ](--[a-z][a-z0-9-]*)["')]""", text)
    )


def unknown_flags(role: str, arguments: Sequence[str]) -> list[str]:
    """Return the flags among `arguments` that the role does not have."""
    flags = [each.partition("=")[0] for each in arguments if re.match(r"--[a-z]", each)]
    return [flag for flag in flags if flag not in role_flags(role)]
