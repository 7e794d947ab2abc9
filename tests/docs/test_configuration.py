"""docs/configuration.md says what the settings say, and leaves none out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from trtllm_mm_cache.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/configuration.md"


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


def test_every_flag_of_every_command_is_in_the_reference() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, command in cli.commands.items():
        assert f"### `trtllm-mm-cache {name}`" in text
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"| `{option.opts[0]}` |" in text, f"{name} {option.opts[0]}"
