"""How a setting is spelled on a command line: one flag a field, wherever the field is nested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo


def leaves(settings: type[BaseModel], *above: str) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield every setting of a class with its path, those of nested classes in their place."""
    for name, field in settings.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from leaves(nested, *above, name)
        else:
            yield (*above, name), field


def extra(field: FieldInfo) -> dict[str, Any]:
    """Return what `settings.py` notes of a field beside its type: `env`, `form`, `constant`."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def is_constant(field: FieldInfo) -> bool:
    """Whether a setting is one without a flag (`settings.constant`)."""
    return bool(extra(field).get("constant"))


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def arguments(given: BaseModel, role: type[BaseModel]) -> list[str]:
    """Return the command line by which a process of `role` gets the settings that it shares with `given`.

    Shared is what both have by the same name, but no secret: every user can see a command line. What is
    `role`'s own default is left out, unless a variable of the environment could say otherwise.
    """
    values = {path[-1]: _value(given, path) for path, _ in leaves(type(given))}
    line: list[str] = []
    for path, field in leaves(role):
        name = path[-1]
        value = values.get(name)
        if (
            is_constant(field)
            or value is None
            or isinstance(value, SecretStr)
            or (value == field.default and "env" not in extra(field))
        ):
            continue
        if field.annotation is bool:
            line += [flag(name)] if value else []
        else:
            line += [flag(name), f"{value:.15g}" if isinstance(value, float) else str(value)]
    return line


def _value(settings: BaseModel, path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        value = getattr(value, name)
    return value
