"""What is wrong with a documented call of one of this project's programs, without running it."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import click
from pydantic import BaseModel, ValidationError

from tests.docs.arguments import parse_arguments
from tests.docs.documents import ROOT, tracked_files
from tests.docs.shell import ELLIPSES, Command, is_placeholder
from tests.docs.variables import is_launch_variable, is_read, make_variables
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.settings import DropSettings, EncodeSettings, FrontendSettings, PdSettings, TopSettings
from trtllm_mm_cache.settings import PlanSettings

SETTINGS: dict[str, type[BaseModel]] = {
    "frontend": FrontendSettings,
    "encode": EncodeSettings,
    "pd": PdSettings,
    "drop": DropSettings,
    "top": TopSettings,
    "plan": PlanSettings,
}


def problem_of(command: Command) -> str | None:
    """Return what is wrong with a call, or None."""
    check = {
        "trtllm-mm-cache": lambda: _cli(command.arguments, command.whole),
        "disagg_e_pd.sh": lambda: _launch(command),
        "setup_venv.sh": lambda: _setup(command.arguments),
        "export": lambda: None,
        "make": lambda: _make(command.arguments),
        "pip": lambda: _pip(command.arguments),
        "pytest": lambda: _pytest(command.arguments),
    }.get(command.program, lambda: _python(command))
    known = is_launch_variable if command.program == "disagg_e_pd.sh" else is_read
    unknown = [name for name in command.variables if not known(name)]
    return f"no variable {unknown[0]}" if unknown else check()


def cli_flags() -> set[str]:
    """Every flag of every subcommand."""
    options = [option for command in cli.commands.values() for option in command.params]
    return {
        "--help",
        "--version",
        *(name for option in options for name in (*option.opts, *option.secondary_opts)),
    }


def _cli(arguments: Sequence[str], whole: bool) -> str | None:
    if not arguments or arguments[0] in ("--help", "--version", *ELLIPSES):
        return None
    role, *rest = arguments
    if is_placeholder(role):
        return next(
            (f"no flag {flag}" for flag in rest if flag.startswith("--") and flag not in cli_flags()), None
        )
    if role not in cli.commands:
        return f"no command {role}"
    command = cli.commands[role]
    try:
        if not whole or "--help" in rest:
            command.make_parser(click.Context(command)).parse_args(
                [each for each in rest if each != "--help"]
            )
            return None
        values = command.make_context(role, [*rest]).params
        if role in SETTINGS:
            SETTINGS[role].model_validate(
                {name: value for name, value in values.items() if value not in (None, ())}
            )
    except click.UsageError as error:
        return error.format_message()
    except ValidationError as error:
        return str(error)
    return None


def _launch(command: Command) -> str | None:
    encode = command.variables.get("ENCODE_EXTRA_ARGS", "").split()
    if problem := _cli(["encode", *encode], whole=False):
        return f"ENCODE_EXTRA_ARGS: {problem}"
    if "--help" in command.arguments:
        return None
    given = ["--model-path", "model"]  # the script gives it
    return _cli(["pd", *given, *command.arguments], command.whole)


def _make(arguments: Sequence[str]) -> str | None:
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name not in make_variables():
            return f"the Makefile has no variable {name}"
    targets = [argument for argument in arguments if "=" not in argument and argument not in ELLIPSES]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ended = subprocess.run(
        ["make", "--dry-run", *targets],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ended.stderr.strip() or None


def _python(command: Command) -> str | None:
    if command.arguments[:1] == ("-m",):
        module, *rest = command.arguments[1:]
        if module == "trtllm_mm_cache.cli.main":
            return _cli(rest, command.whole)
        if module.startswith("trtllm_mm_cache"):
            return f"{module} is no program"
        path = PurePosixPath(module.replace(".", "/") + ".py")
        if path.parts[0] not in {each.parts[0] for each in tracked_files()}:
            return None  # another project's module
    elif command.arguments and command.arguments[0].endswith(".py"):
        path, rest = PurePosixPath(command.arguments[0]), [*command.arguments[1:]]
    else:
        return None
    if path not in tracked_files():
        return f"{path} is not there"
    return parse_arguments(ROOT / path, rest, command.whole)


@cache
def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _setup(arguments: Sequence[str]) -> str | None:
    return _unknown_extra([each for each in arguments[1:] if each not in ("--dev", *ELLIPSES)])


def _pip(arguments: Sequence[str]) -> str | None:
    for argument in arguments:
        name, bracket, extras = argument.rstrip("]").partition("[")
        if (
            bracket
            and PurePosixPath(name).name in ("", "trtllm-mm-cache")
            and (problem := _unknown_extra(extras.split(",")))
        ):
            return problem
    return None


def _unknown_extra(extras: Sequence[str]) -> str | None:
    known = _project()["project"]["optional-dependencies"]
    return next((f"no extra {extra}" for extra in extras if extra not in known), None)


def _pytest(arguments: Sequence[str]) -> str | None:
    markers = [marker.partition(":")[0] for marker in _project()["tool"]["pytest"]["ini_options"]["markers"]]
    for option, value in pairwise(arguments):
        if option == "-m" and (unknown := {*value.split()} - {*markers, "or", "and", "not"}):
            return f"no marker {unknown.pop()}"
    return None
