"""docs/configuration.md says what the settings say."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.documents import ROOT


def test_the_reference_is_what_its_tool_writes() -> None:
    ended = subprocess.run(
        [sys.executable, "tools/configuration_reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
