"""The repository's Markdown as a parser sees it: links, anchors, code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt
from markdown_it.token import Token
from myst_parser.slugs import github_slugify, unique_slug

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Piece:
    """A link's target or a piece of code, and where it stands."""

    text: str
    where: str


@dataclass(frozen=True)
class Document:
    """One Markdown file; `path` is relative to the repository's root."""

    path: PurePosixPath
    tokens: tuple[Token, ...]

    @property
    def anchors(self) -> set[str]:
        """What a link may name after `#`: the headings, as a git host spells them."""
        slugs: set[str] = set()
        for heading, inline in pairwise(self.tokens):
            if heading.type == "heading_open":
                title = "".join(
                    child.content for child in inline.children or [] if child.type in ("text", "code_inline")
                )
                slugs.add(unique_slug(github_slugify(title), slugs))
        return slugs

    def links(self) -> Iterator[Piece]:
        """Targets of links and images."""
        for token, where in self._flat():
            for attribute in ("href", "src"):
                if isinstance(target := token.attrs.get(attribute), str):
                    yield Piece(target, where)

    def blocks(self) -> Iterator[Piece]:
        """Blocks of code, fenced or indented."""
        return (
            Piece(token.content, at) for token, at in self._flat() if token.type in ("fence", "code_block")
        )

    def inline_code(self) -> Iterator[Piece]:
        """Code inside a line or a table's cell."""
        return (Piece(token.content, at) for token, at in self._flat() if token.type == "code_inline")

    def _flat(self) -> Iterator[tuple[Token, str]]:
        line = 1
        for token in self.tokens:
            line = token.map[0] + 1 if token.map else line
            for each in (token, *(token.children or [])):
                yield each, f"{self.path}:{line}"


@cache
def tracked_paths() -> frozenset[PurePosixPath]:
    """All files that git tracks or would, and their folders, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    files = {PurePosixPath(name) for name in listed.split("\0") if name and (ROOT / name).exists()}
    return frozenset({*files, *(folder for path in files for folder in path.parents)})


@cache
def documents() -> tuple[Document, ...]:
    """Every Markdown file of the repository."""
    parser = MarkdownIt("commonmark").enable("table")
    return tuple(
        Document(path, tuple(parser.parse((ROOT / path).read_text(encoding="utf-8"))))
        for path in sorted(tracked_paths())
        if path.suffix == ".md"
    )


@cache
def present_documents() -> tuple[Document, ...]:
    """The same without the changelog, which names what is gone."""
    return tuple(each for each in documents() if each.path.name != "CHANGELOG.md")
