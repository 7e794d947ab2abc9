"""Every documented command could be typed: its program, its flags, the targets of make are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

import pytest

from tests.docs.documents import ROOT, Document, present_documents, tracked_paths
from tests.docs.flags import ROLES, role_flags, script_flags, unknown_flags
from trtllm_mm_cache.flags import extra, leaves
from trtllm_mm_cache.settings import ServeSettings

SERVE_VARIABLES = {extra(field).get("env") for _, field in leaves(ServeSettings)}
PROGRAMS = ("trtllm-mm-cache", "disagg_e_pd.sh", "make", "python")
# Flags that the pages name of other programs: mpirun's, Docker's, kubectl's.
FOREIGN_FLAGS = {
    "--wait",  # docker compose
    "--allow-run-as-root",
    "--bind-to",
    "--oversubscribe",
    "--shm-size",
    "--dry-run",
    "--hostfile",
}

every_page = pytest.mark.parametrize("document", present_documents(), ids=lambda document: str(document.path))


def commands(document: Document) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Yield where, program, the words before it and its arguments, for each call of a program of ours."""
    for code in (*document.blocks(), *document.inline_code()):
        for line in code.text.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose with an apostrophe, output
                continue
            names = [word.rpartition("/")[2] for word in words]
            for program in PROGRAMS:
                if program in names:
                    position = names.index(program)
                    rest = takewhile(lambda word: not set(word) <= set(";&|<>"), words[position + 1 :])
                    yield code.where, program, words[:position], [each.rstrip(";") for each in rest]
                    break


def problem_of(program: str, before: Sequence[str], arguments: Sequence[str]) -> str | None:
    """Return what is wrong with a call, or None."""
    unknown: list[str] = []
    match program, [*arguments]:
        case "trtllm-mm-cache", [role, *rest] if role in ROLES:
            unknown = unknown_flags(role, rest)
        case "trtllm-mm-cache", [role, *_] if role.isalpha() and role.islower():
            return f"no command {role}"
        case "disagg_e_pd.sh", [*rest] if "--help" not in rest:
            names = [word.partition("=")[0] for word in before if "=" in word]
            unknown = [name for name in names if name not in SERVE_VARIABLES]
            unknown += unknown_flags("serve", rest)
        case "make", targets:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            wanted = [re.sub("=.*", " ?=", target) for target in targets if target not in ("…", "...")]
            unknown = [each for each in wanted if f"\n{each}" not in makefile]
        case "python", ["-m", module, *rest] if module.partition(".")[0] in ("benchmarks", "tests", "tools"):
            path = module.replace(".", "/")
            package = PurePosixPath(path, "__main__.py")
            return _script_problem(str(package) if package in tracked_paths() else f"{path}.py", rest)
        case "python", [script, *rest] if script.endswith(".py"):
            return _script_problem(script, rest)
    return f"no {', '.join(unknown)}" if unknown else None


def _script_problem(path: str, arguments: Sequence[str]) -> str | None:
    if PurePosixPath(path) not in tracked_paths():
        return f"{path} is not there"
    text = (ROOT / path).read_text(encoding="utf-8")
    unknown = [each for each in arguments if each.startswith("--") and f'"{each}"' not in text]
    return f"no {', '.join(unknown)}" if unknown else None


@every_page
def test_every_command_could_be_typed(document: Document) -> None:
    found = [(where, program, problem_of(program, *rest)) for where, program, *rest in commands(document)]
    assert not [f"{where}: {program}: {problem}" for where, program, problem in found if problem]


@every_page
def test_every_flag_that_is_named_exists(document: Document) -> None:
    known = {*FOREIGN_FLAGS, *script_flags(), *(flag for role in ROLES for flag in role_flags(role))}
    words = [
        (word.partition("=")[0], code.where) for code in document.inline_code() for word in code.text.split()
    ]
    named = [(word, where) for word, where in words if re.fullmatch(r"--[a-z][a-z0-9-]*[a-z0-9]", word)]
    assert not [f"{where}: {word}" for word, where in named if word not in known]
