"""The repository's Markdown as a parser sees it: links, anchors, blocks of code, code inside lines."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt
from markdown_it.token import Token
from myst_parser.slugs import github_slugify, unique_slug

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Piece:
    """Something in a document: its text, where it stands, and the language of a block ("" for none)."""

    text: str
    where: str
    language: str = ""


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
        """Targets of links and images, written as Markdown or as HTML."""
        for token, where in self._flat():
            for attribute in ("href", "src"):
                if isinstance(target := token.attrs.get(attribute), str):
                    yield Piece(target, where)
            if token.type in ("html_inline", "html_block"):
                yield from (Piece(target, where) for target in _html_targets(token.content))

    def blocks(self) -> Iterator[Piece]:
        """Blocks of code, fenced or indented."""
        for token, where in self._flat():
            if token.type in ("fence", "code_block"):
                yield Piece(token.content, where, token.info.strip())

    def inline_code(self) -> Iterator[Piece]:
        """Code inside a line or a table's cell."""
        for token, where in self._flat():
            if token.type == "code_inline":
                yield Piece(token.content, where)

    def _flat(self) -> Iterator[tuple[Token, str]]:
        line = 1
        for token in self.tokens:
            line = token.map[0] + 1 if token.map else line
            for each in (token, *(token.children or [])):
                yield each, f"{self.path}:{line}"


@cache
def tracked_files() -> frozenset[PurePosixPath]:
    """All files that git tracks or would, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return frozenset(PurePosixPath(name) for name in listed.split("\0") if name and (ROOT / name).exists())


@cache
def tracked_paths() -> frozenset[PurePosixPath]:
    """Those files and the folders that they are in."""
    return frozenset({*tracked_files(), *(folder for path in tracked_files() for folder in path.parents)})


@cache
def documents() -> tuple[Document, ...]:
    """Every Markdown file of the repository."""
    return tuple(_read(path) for path in sorted(tracked_files()) if path.suffix == ".md")


@cache
def present_documents() -> tuple[Document, ...]:
    """The same without what tells of the past: the released versions of the changelog."""
    return tuple(
        _read(each.path, unreleased_only=True) if each.path.name == "CHANGELOG.md" else each
        for each in documents()
    )


def parse_document(path: PurePosixPath, text: str) -> Document:
    """Return `text` as a document that stands at `path`."""
    return Document(path, tuple(MarkdownIt("commonmark").enable("table").parse(text)))


def _read(path: PurePosixPath, *, unreleased_only: bool = False) -> Document:
    text = (ROOT / path).read_text(encoding="utf-8")
    if unreleased_only:
        head, unreleased, *_ = text.split("\n## ")
        text = f"{head}\n## {unreleased}"
    return parse_document(path, text)


def _html_targets(html: str) -> list[str]:
    targets: list[str] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            targets.extend(value for name, value in attrs if name in ("href", "src") and value)

    Collector().feed(html)
    return targets
