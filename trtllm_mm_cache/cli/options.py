"""Command-line options from a settings class: one flag a field, wherever the field is nested.

Why no library does this: docs/decisions.md, "Flags from settings".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from trtllm_mm_cache.flags import extra, flag, is_constant, leaves

Model = TypeVar("Model", bound=BaseModel)


def settings_options(settings: type[Model]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command: every field of `settings` becomes a flag, and the command gets one instance.

    The instance is the first parameter; what other decorators of click add follows by name. Of a field's
    `json_schema_extra`, `env` names the variable that counts where the flag is not given, and `form` says in
    words what a `pattern` asks for. A value that the settings refuse is a usage error that names the flag.
    """
    flags = {path[-1]: (path, field) for path, field in leaves(settings) if not is_constant(field)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            given = {name: values.pop(name) for name in flags}
            return command(build(settings, given), **values)

        decorated: Callable[..., Any] = run
        for name, (_, field) in reversed(flags.items()):
            decorated = _option(name, field)(decorated)
        return decorated

    return decorate


def build(settings: type[Model], values: dict[str, Any]) -> Model:
    """Return the settings for the values of click's parameters, by name; None means not given.

    Raises `click.UsageError`, which names the flags at fault.
    """
    fields = dict(leaves(settings))
    nested: dict[str, Any] = {}
    for path in fields:
        if (value := values.get(path[-1])) is not None:
            inner = nested
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = value
    try:
        return settings.model_validate(nested)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            path = next(path for path in fields if problem["loc"][: len(path)] == path)
            form = extra(fields[path]).get("form")
            text = f"must be {form}, not '{problem['input']}'" if form else problem["msg"]
            problems.append(f"{flag(path[-1])}: {text}")
        raise click.UsageError("; ".join(problems)) from error


def parse(settings: type[Model], arguments: Sequence[str]) -> Model:
    """Return the settings of a command line, as a command of `settings_options` would get them.

    Raises `click.UsageError`.
    """
    taken: list[Model] = []
    command = click.command(settings.__name__)(settings_options(settings)(taken.append))
    command.main([*arguments], standalone_mode=False)
    return taken[0]


def _option(name: str, field: FieldInfo) -> Callable[..., Any]:
    env = extra(field).get("env")
    common: dict[str, Any] = {"help": field.description, "envvar": env, "show_envvar": env is not None}
    if field.annotation is bool:
        return click.option(flag(name), name, is_flag=True, default=field.default, **common)
    if not field.is_required():
        common |= {"default": field.default, "show_default": field.default not in (None, ())}
    return click.option(
        flag(name),
        name,
        type=_click_type(field.annotation, field),
        multiple=get_origin(field.annotation) is tuple,
        required=field.is_required(),
        **common,
    )


def _click_type(annotation: Any, field: FieldInfo) -> click.ParamType[Any] | type[str]:
    """Return the type of a value, with the field's bounds; `X | None` and tuples have that of an X."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return click.Choice(parts)
    if parts:
        return _click_type(parts[0], field)
    if annotation in (str, SecretStr):
        return str
    if annotation is Path:
        return click.Path(path_type=Path)
    if annotation not in (int, float):
        raise TypeError(f"no command-line form for {annotation}")
    low, least, high, most = (_bound(field, name) for name in ("gt", "ge", "lt", "le"))
    return (click.IntRange if annotation is int else click.FloatRange)(
        min=low if least is None else least,
        max=high if most is None else most,
        min_open=low is not None,
        max_open=high is not None,
    )


def _bound(field: FieldInfo, name: str) -> Any:
    return next((getattr(mark, name) for mark in field.metadata if hasattr(mark, name)), None)
