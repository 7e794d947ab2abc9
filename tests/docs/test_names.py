"""Files, flags and variables that the prose names are there."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.docs.arguments import flags_of
from tests.docs.documents import ROOT, Document, Piece, present_documents, tracked_files, tracked_paths
from tests.docs.programs import cli_flags
from tests.docs.shell import commands, parse
from tests.docs.variables import CODE, is_read

# Where a path in the prose may begin: pages name files of the package and tests without the folder before.
ROOTS = (PurePosixPath("."), PurePosixPath("trtllm_mm_cache"), PurePosixPath("tests"))
# Flags of other programs that the prose names: mpirun's, Docker's, kubectl's.
FOREIGN_FLAGS = frozenset({"--allow-run-as-root", "--bind-to", "--oversubscribe", "--shm-size", "--dry-run"})


def path_is_there(word: str) -> bool:
    """False for what looks like a path of this repository and is none."""
    path = PurePosixPath(word)
    if len(path.parts) < 2 or not set(word).isdisjoint(":{}$<>=@…"):
        return True
    roots = [root for root in ROOTS if root / path.parts[0] in tracked_paths()]
    if not roots:  # another project's
        return True
    if "*" in word:
        return any(fnmatch(str(found), str(root / path)) for root in roots for found in tracked_paths())
    return any(root / path in tracked_paths() for root in roots)


def flag_exists(word: str) -> bool:
    """False for a flag that no command and no script of this project has."""
    flag = word.partition("=")[0]
    return flag in FOREIGN_FLAGS or flag in cli_flags() or flag in _script_flags()


@cache
def _script_flags() -> frozenset[str]:
    scripts = [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in CODE[2:]]
    return frozenset(flag for path in scripts for flag in flags_of(ROOT / path))


def _words(document: Document) -> Iterator[Piece]:
    """Words of code inside lines, and of commands."""
    for code in document.inline_code():
        yield from (Piece(word, code.where) for word in code.text.split())
    for command in commands(document):
        yield from (Piece(word, command.where) for word in command.arguments)


def _is_variable(word: str) -> bool:
    name = word.partition("=")[0]
    return name.isidentifier() and name.isupper() and ("_" in name.strip("_") or "=" in word)


per_document = pytest.mark.parametrize(
    "document", present_documents(), ids=lambda document: str(document.path)
)


@per_document
def test_files_that_are_named_are_there(document: Document) -> None:
    assert not [f"{word.where}: {word.text}" for word in _words(document) if not path_is_there(word.text)]


@per_document
def test_flags_that_are_named_exist(document: Document) -> None:
    unknown = [
        f"{code.where}: {word}"
        for code in document.inline_code()
        if not [*parse(code.text, code.where)]  # test_commands.py has those
        for word in code.text.split()
        if word.startswith("--") and not word.endswith("-") and not flag_exists(word)
    ]
    assert not unknown, "no flags of this project; another program's are listed in FOREIGN_FLAGS"


@per_document
def test_variables_that_are_named_are_read(document: Document) -> None:
    unknown = [
        f"{word.where}: {word.text}"
        for word in _words(document)
        if _is_variable(word.text) and not is_read(word.text.partition("=")[0])
    ]
    assert not unknown, "nothing here reads them; other programs' begin with one of FOREIGN_VARIABLES"


def test_a_wrong_name_is_found() -> None:
    for word in ["pd/resolve.py", "tests/docs/", "configs/*/pd.yaml", "tensorrt_llm/llmapi/llm.py"]:
        assert path_is_there(word), word
    for word in ["workers/resolve.py", "tests/doc/x", "docs/mpi.txt", "configs/*/pds.yaml", "./launch/x.sh"]:
        assert not path_is_there(word), word
    assert flag_exists("--http-cache-mb")
    assert flag_exists("--no-allow-private-addresses")
    assert flag_exists("--two-hosts")
    assert not flag_exists("--http-cache-gb")
    assert is_read("PD_RANKS")
    assert is_read("UCX_TLS")
    assert is_read("KEY_SCHEME")
    assert not is_read("PD_RANK")
