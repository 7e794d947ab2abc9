"""Every link leads to a file that is there and to a heading in it. Web addresses are not visited."""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.documents import Document, documents, tracked_paths


def problem_of(document: Document, target: str) -> str | None:
    """Return what is wrong with a link in `document`, or None."""
    url = urlsplit(target)
    if url.scheme in ("http", "https"):
        return None if url.hostname else "is no web address"
    if url.scheme or url.netloc:
        return "has a scheme that is neither http nor https"
    path = document.path
    if url.path:
        path = PurePosixPath(posixpath.normpath(document.path.parent / unquote(url.path)))
        if path not in tracked_paths():
            return f"leads to {path}, which is not there"
    if not url.fragment:
        return None
    linked = next((each for each in documents() if each.path == path), None)
    if linked is None:
        return f"has an anchor, but {path} is no Markdown"
    if url.fragment not in linked.anchors:
        return f"has no heading in {path}; there are {', '.join(sorted(linked.anchors))}"
    return None


@pytest.mark.parametrize("document", documents(), ids=lambda document: str(document.path))
def test_every_link_leads_somewhere(document: Document) -> None:
    found = [(link, problem_of(document, link.text)) for link in document.links()]
    assert not [f"{link.where}: {link.text} {problem}" for link, problem in found if problem]


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("mpi.md", None),
        ("../SECURITY.md#how-to-report", None),
        ("tensorrt-llm.md#several-ranks", None),
        ("../deploy/grafana/", None),
        ("#floors", None),
        ("https://example.com/a#b", None),
        ("mpy.md", "leads to docs/mpy.md, which is not there"),
        ("../../mpi.md", "leads to ../mpi.md, which is not there"),
        ("tensorrt-llm.md#two-ranks", "has no heading in docs/tensorrt-llm.md"),
        ("#Floors", "has no heading in docs/architecture.md"),
        ("../Makefile#docs", "is no Markdown"),
        ("https://", "is no web address"),
        ("file:///etc/passwd", "has a scheme"),
    ],
)
def test_a_wrong_link_is_found(target: str, problem: str | None) -> None:
    document = next(each for each in documents() if str(each.path) == "docs/architecture.md")
    found = problem_of(document, target)
    assert found == problem or problem in (found or "")
