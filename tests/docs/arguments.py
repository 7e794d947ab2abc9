"""Arguments of a script, held against its own `add_argument` calls: the file is read and not run."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.docs.shell import ELLIPSES


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def parse_arguments(path: Path, arguments: Sequence[str], whole: bool) -> str | None:
    """Return what the script at `path` would say against the arguments, or None.

    What is required and what a value must be counts only where the call is `whole`.
    """
    parser = _Parser(exit_on_error=False, allow_abbrev=False)
    for call, names in _calls(path):
        parser.add_argument(*names, **_keywords(call, whole))
    try:
        _, unknown = parser.parse_known_args([each for each in arguments if each != "--help"])
    except argparse.ArgumentError as error:
        return str(error)
    unknown = [each for each in unknown if each not in ELLIPSES]
    return f"no argument {unknown[0]}" if unknown else None


def _keywords(call: ast.Call, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in ("nargs", "action") and isinstance(keyword.value, ast.Constant):
            found[keyword.arg] = keyword.value.value
        if keyword.arg == "required":
            found["required"] = whole
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and whole:
            found["type"] = {"int": int, "float": float}.get(keyword.value.id, str)
    return found


def flags_of(path: Path) -> set[str]:
    """Return the flags that the script at `path` adds to a parser; none where it has no parser."""
    return {name for _, names in _calls(path) for name in names if name.startswith("--")}


def _calls(path: Path) -> list[tuple[ast.Call, list[str]]]:
    text = path.read_text(encoding="utf-8")
    if "add_argument(" not in text:
        return []
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [
        (call, [str(name.value) for name in call.args if isinstance(name, ast.Constant)])
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
    ]
