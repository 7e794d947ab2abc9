"""Turns a settings class into command-line options: the field is the flag, its description the help."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

Model = TypeVar("Model", bound=BaseModel)


def settings_options(settings: type[Model]) -> Callable[[Callable[[Model], Any]], Callable[..., Any]]:
    """Decorate a command so that it takes every field of `settings` as a flag and gets one instance.

    A field's `json_schema_extra={"env": NAME}` makes the environment variable NAME its fallback.
    A value that the settings refuse becomes a usage error that names the flag; for a field with a `pattern`,
    `json_schema_extra={"form": TEXT}` is what the value must be, in words.
    """

    def decorate(command: Callable[[Model], Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            return command(_build(settings, values))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        decorated: Callable[..., Any] = run
        for name, field in reversed(settings.model_fields.items()):
            decorated = _option(name, field)(decorated)
        return decorated

    return decorate


def _build(settings: type[Model], values: dict[str, Any]) -> Model:
    # click's word for a flag that was not given: None, or an empty tuple where there may be several.
    given = {name: value for name, value in values.items() if value not in (None, ())}
    try:
        return settings.model_validate(given)
    except ValidationError as error:
        problems = (_describe(problem, settings) for problem in error.errors())
        raise click.UsageError("; ".join(problems)) from error


def _describe(problem: ErrorDetails, settings: type[BaseModel]) -> str:
    name = str(problem["loc"][0])
    text = problem["msg"]
    if problem["type"] == "string_pattern_mismatch":
        text = f"must be {_extra(settings.model_fields[name])['form']}, not '{problem['input']}'"
    return f"{_flag(name)}: {text}"


def _option(name: str, field: FieldInfo) -> Callable[..., Any]:
    required = field.default is PydanticUndefined
    extra = _extra(field)
    env = extra.get("env")
    if extra.get("switch"):
        return click.option(_flag(name), name, is_flag=True, default=None, help=field.description)
    if field.annotation is bool:
        return click.option(
            f"{_flag(name)}/--no-{_flag(name)[2:]}", name, default=None, envvar=env, help=_help(field)
        )
    several = typing.get_origin(field.annotation) is tuple
    return click.option(
        _flag(name),
        name,
        type=_click_type(field),
        multiple=several,
        required=required,
        envvar=env,
        show_envvar=env is not None,
        help=_help(field),
    )


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default in (PydanticUndefined, None):
        return text
    default = field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if isinstance(default, tuple):
        default = ", ".join(default)
    return f"{text}  [default: {default}]"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _click_type(field: FieldInfo) -> click.ParamType[Any] | type:
    annotation = field.annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return click.Choice([str(choice) for choice in typing.get_args(annotation)])
    if annotation is Path:
        return click.Path(path_type=Path)
    if annotation in (int, float, str):
        return typing.cast(type, annotation)
    raise TypeError(f"no command-line form for {annotation}")
