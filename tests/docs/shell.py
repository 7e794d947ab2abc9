"""Commands in the documents' blocks and lines, split as a shell splits them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tests.docs.documents import Document

# Indented blocks and fences without a language hold commands, output and drawings alike.
SHELL_LANGUAGES = ("", "bash", "sh", "shell", "console")
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
        if block.language in SHELL_LANGUAGES:
            for line in block.text.replace("\\\n", " ").splitlines():
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
