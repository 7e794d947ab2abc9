"""Commands in the documents' blocks and lines, split as a shell splits them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import yaml

from tests.docs.documents import Document, Piece

# Indented blocks and fences without a language hold commands, output and drawings alike.
SHELL_LANGUAGES = ("", "bash", "sh", "shell", "console", "dockerfile")
PROGRAMS = (
    "trtllm-mm-cache",
    "disagg_e_pd.sh",
    "setup_venv.sh",
    "make",
    "python",
    "python3",
    "pytest",
    "pip",
)
LAUNCHERS = (
    "mpirun",
    "ip",
    "env",
    "exec",
    "timeout",
    "nohup",
    "sudo",
    "time",
    "do",
    "then",
    "RUN",
    "docker",
    "kubectl",
)
ELLIPSES = ("…", "...")
_OPERATORS = ";&|<>()"


@dataclass(frozen=True)
class Command:
    """One call of a program: variables set before it, its name without the path, its arguments.

    `whole` is False where the document leaves something out or writes a placeholder for it.
    """

    where: str
    variables: dict[str, str]
    program: str
    arguments: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.program} {shlex.join(self.arguments)}"


def is_placeholder(word: str) -> bool:
    """Whether a word stands for others: N, HOST:PORT, 64-HEX-DIGITS, <name>."""
    letters = [letter for letter in word if letter.isalpha()]
    return (bool(letters) and word == word.upper() and "=" not in word) or word.startswith("<")


def commands(document: Document) -> Iterator[Command]:
    """All calls of `PROGRAMS` in the document, and exports of variables."""
    for block in document.blocks():
        lines: Iterable[str] = ()
        if block.language in SHELL_LANGUAGES:
            lines = _lines(block)
        elif block.language == "yaml":
            lines = _container_commands(_load_yaml(block.text))
        for line in lines:
            yield from parse(line.removeprefix("$ "), block.where)
    for code in document.inline_code():
        yield from parse(code.text, code.where, whole=False)


def parse(line: str, where: str, *, whole: bool = True) -> Iterator[Command]:
    """The calls in one line, which may hold several, in a pipe or after a launcher like mpirun.

    A line that no shell would take is prose or a drawing.
    """
    if not any(program in line for program in (*PROGRAMS, "export")):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an apostrophe
        return
    while words:
        part = list(takewhile(lambda word: not set(word) <= set(_OPERATORS), words))
        yield from _command(part, where, whole)
        words = words[len(part) + 1 :]


def _lines(block: Piece) -> Iterator[str]:
    """The commands of a block, one each; where the block is known to be a shell's, quotes may span lines."""
    pending = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not pending and not line.startswith("$ "):
            continue  # output
        pending = f"{pending}\n{line}" if pending else line
        if not block.language or _is_closed(pending):
            yield pending
            pending = ""


def _is_closed(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def _load_yaml(text: str) -> list[Any]:
    try:
        return [*yaml.safe_load_all(text)]
    except yaml.YAMLError:  # test_blocks.py says so
        return []


def _container_commands(values: Any) -> Iterator[str]:
    """`command` and `args` of the containers in manifests for Kubernetes or Compose, as lines of a shell."""
    if isinstance(values, list):
        for inner in values:
            yield from _container_commands(inner)
    if isinstance(values, dict):
        parts = [values.get("command"), values.get("args")]
        lists = [shlex.join(map(str, part)) for part in parts if isinstance(part, list)]
        yield " ".join([*(part for part in parts if isinstance(part, str)), *lists])
        yield from _container_commands([*values.values()])


def _command(words: Sequence[str], where: str, whole: bool) -> Iterator[Command]:
    variables = dict(word.split("=", 1) for word in takewhile(_is_assignment, words))
    words = words[len(variables) :]
    if words[:1] == ["export"]:
        exported = dict(word.split("=", 1) for word in words[1:] if _is_assignment(word))
        yield Command(where, exported, "export", (), whole)
    launched = bool(words) and words[0] in LAUNCHERS
    for position, word in enumerate(words):
        if (name := word.rpartition("/")[2]) in PROGRAMS:
            arguments = tuple(words[position + 1 :])
            left_out = any(each.endswith(ELLIPSES) or is_placeholder(each) for each in arguments)
            yield Command(where, variables, name, arguments, whole and not left_out)
            return
        if not launched:
            return


def _is_assignment(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.isidentifier()
