"""The documentation site builds without a warning, with the docstrings of the public API in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        *(sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"),
        *("-c", "docs", "-d", folder / "doctrees", ".", folder / "html"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    if ended.returncode:
        pytest.fail(f"`make docs` would fail:\n{ended.stderr}", pytrace=False)
    return folder / "html"


def test_the_first_page_leads_to_every_other_one(site: Path) -> None:
    first = (site / "docs/index.html").read_text(encoding="utf-8")
    assert 'href="docs/index.html"' in (site / "index.html").read_text(encoding="utf-8")
    for page in ["configuration.html", "failure-modes.html", "../SECURITY.html", "api/index.html"]:
        assert f'href="{page}"' in first


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("cache", ["cache.key.embedding_key", "cache.manager.MultimodalEmbeddingCacheManager.reserve"]),
        ("transfer", ["transfer.exporter.Exporter.export", "transfer.reader.Reader.read_into"]),
        ("engines", ["engines.base.VisionEncoder.encode", "engines.base.Generator.generate"]),
        ("errors", ["errors.MmCacheError", "errors.ArenaFullError"]),
    ],
)
def test_docstrings_of_the_public_api_are_in_it(site: Path, page: str, names: list[str]) -> None:
    text = (site / f"docs/api/{page}.html").read_text(encoding="utf-8")
    for name in names:
        assert f'id="trtllm_mm_cache.{name}"' in text


def test_errors_in_docstrings_lead_to_their_page(site: Path) -> None:
    text = (site / "docs/api/media.html").read_text(encoding="utf-8")
    assert 'href="errors.html#trtllm_mm_cache.errors.InvalidImageError"' in text


def test_blocks_in_docstrings_keep_their_lines(site: Path) -> None:
    """An indented block after a line that does not end in two colons would be run together."""
    for page in (site / "docs/api").glob("*.html"):
        assert "<blockquote" not in page.read_text(encoding="utf-8"), page.name
