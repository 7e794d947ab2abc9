"""The documentation site builds without a warning, with the docstrings of the public API in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documents import ROOT


def test_the_site_builds_and_holds_the_public_api(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"),
        *("-c", "docs", "-d", tmp_path / "doctrees", ".", tmp_path / "html"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    if ended.returncode:
        pytest.fail(f"`make docs` would fail:\n{ended.stderr}", pytrace=False)
    pages = {
        page.stem: page.read_text(encoding="utf-8") for page in (tmp_path / "html/docs/api").glob("*.html")
    }
    # An autodoc directive that finds nothing is no warning; a name that is not there is.
    for page, name in [
        ("cache", "cache.manager.MultimodalEmbeddingCacheManager.reserve"),
        ("transfer", "transfer.reader.Reader.read_into"),
        ("engines", "engines.base.VisionEncoder.encode"),
        ("errors", "errors.ArenaFullError"),
    ]:
        assert f'id="trtllm_mm_cache.{name}"' in pages[page]
    # A block in a docstring after a line that does not end in two colons would be run together.
    assert not [page for page, text in pages.items() if "<blockquote" in text]
