"""Every link leads to a file that is there and to a heading in it; every file that is named is there.

Web addresses are not visited.
"""

from __future__ import annotations

import posixpath
from fnmatch import fnmatch
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.documents import Document, documents, present_documents, tracked_paths

# Pages name files of the package and of tests without the folder before.
ROOTS = (PurePosixPath("."), PurePosixPath("trtllm_mm_cache"), PurePosixPath("tests"))


def link_problem(document: Document, target: str) -> str | None:
    """Return what is wrong with a link in `document`, or None."""
    url = urlsplit(target)
    if url.scheme in ("http", "https"):
        return None
    path = document.path
    if url.path:
        path = PurePosixPath(posixpath.normpath(document.path.parent / unquote(url.path)))
        if path not in tracked_paths():
            return f"leads to {path}, which is not there"
    linked = next((each for each in documents() if each.path == path), None)
    if url.fragment and (linked is None or url.fragment not in linked.anchors):
        return f"{path} has no such heading"
    return None


def path_is_there(word: str) -> bool:
    """False for what begins like a path of this repository and is none."""
    path = PurePosixPath(word)
    roots = [root for root in ROOTS if root / path.parts[0] in tracked_paths()] if len(path.parts) > 1 else []
    if not roots or not set(word).isdisjoint(":{}$<>=@…"):
        return True
    return any(fnmatch(str(found), str(root / path)) for root in roots for found in tracked_paths())


@pytest.mark.parametrize("document", documents(), ids=lambda document: str(document.path))
def test_every_link_leads_somewhere(document: Document) -> None:
    found = [(link, link_problem(document, link.text)) for link in document.links()]
    assert not [f"{link.where}: {link.text} {problem}" for link, problem in found if problem]


@pytest.mark.parametrize("document", present_documents(), ids=lambda document: str(document.path))
def test_every_file_that_is_named_is_there(document: Document) -> None:
    words = [(word, code.where) for code in document.inline_code() for word in code.text.split()]
    assert not [f"{where}: {word}" for word, where in words if not path_is_there(word)]
