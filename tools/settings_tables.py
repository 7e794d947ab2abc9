"""Settings classes as Markdown tables: type, range and default of a field are what its JSON schema says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

# What a field's name says of its unit.
_UNITS = {
    "_gb": "GB",
    "_mb": "MB",
    "_bytes": "bytes",
    "_ms": "ms",
    "_s": "s",
    "_timeout": "s",
    "_megapixels": "megapixels",
}
_RANGES = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"integer": "integer", "number": "number", "boolean": "yes/no", "string": "text", "array": "list"}

Schema = Mapping[str, Any]


def own_fields(settings: type[BaseModel]) -> list[str]:
    """Return the names of the fields that `settings` has and no settings class above it."""
    above = {name for parent in settings.__mro__[1:] for name in getattr(parent, "model_fields", {})}
    return [name for name in settings.model_fields if name not in above]


def flag_table(settings: type[BaseModel], fields: Iterable[str]) -> str:
    """Return one row a command-line flag; a column for environment variables where any flag has one."""
    schema = settings.model_json_schema()
    properties = {name: schema["properties"][name] for name in fields}
    with_environment = any("env" in field for field in properties.values())
    rows = [["flag", "type", "default", *(["variable"] if with_environment else []), "meaning"]]
    for name, field in properties.items():
        variable = f"`{field['env']}`" if "env" in field else ""
        rows.append(
            [
                f"`--{name.replace('_', '-')}`",
                _flag_type(field),
                "" if field.get("switch") else _default(name, field, schema),
                *([variable] if with_environment else []),
                field["description"],
            ]
        )
    return table(rows)


def key_table(settings: type[BaseModel], fields: Iterable[str]) -> str:
    """Return one row a YAML key; the keys of a mapping inside stand after it, as `outer.inner`."""
    schema = settings.model_json_schema()
    rows = [["key", "type", "default", "meaning"]]
    for name in fields:
        field = schema["properties"][name]
        inner = _inner(field, schema)
        rows.append(
            [
                f"`{name}`",
                "mapping" if inner else _type(field),
                _default(name, field, schema),
                field["description"],
            ]
        )
        for inner_name, inner_field in (inner or {}).get("properties", {}).items():
            rows.append(
                [
                    f"`{name}.{inner_name}`",
                    _type(inner_field),
                    _default(inner_name, inner_field, {}),
                    inner_field["description"],
                ]
            )
    return table(rows)


def table(rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; the first row is its heading."""
    heading, *body = [["—" if cell == "" else cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flag_type(field: Schema) -> str:
    if field.get("switch"):
        return "switch"
    return f"{_type(field['items'])}; repeatable" if field.get("type") == "array" else _type(field)


def _type(field: Schema) -> str:
    if "anyOf" in field:  # an optional value: the alternative is null
        field = {**field, **field["anyOf"][0]}
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array":
        return "list of " + _type(field["items"])
    name = "path" if field.get("format") == "path" else _TYPES[field["type"]]
    bounds = [f"{sign} {_number(field[bound])}" for bound, sign in _RANGES.items() if bound in field]
    return ", ".join([name, *bounds])


def _default(name: str, field: Schema, schema: Schema) -> str:
    if name in schema.get("required", ()):
        return "required"
    default = field["default"]
    if default in (None, []):
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, int | float):
        unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")
        return f"{_number(default)} {unit}".rstrip()
    return ", ".join(f"`{value}`" for value in (default if isinstance(default, list) else [default]))


def _inner(field: Schema, schema: Schema) -> Schema | None:
    for alternative in field.get("anyOf", [field]):
        if "$ref" in alternative:
            found: Schema = schema["$defs"][alternative["$ref"].rpartition("/")[2]]
            return found
    return None


def _number(value: float) -> str:
    return json.dumps(int(value) if value == int(value) else value)
