"""An engine's own settings: what each schema is, and how `--extra-engine-args` names a YAML file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trtllm_mm_cache.errors import ConfigurationError


class EngineArgs(BaseModel):
    """The keys of one worker's YAML file. Immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Schema = TypeVar("Schema", bound=EngineArgs)


def load_engine_args(path: Path | None, schema: type[Schema]) -> Schema:
    """Read an engine's YAML file into `schema`; no file means the schema's defaults.

    Raises `ConfigurationError` that names the file and the key for an unknown key, a wrong type,
    a repeated key, or a file that is no YAML mapping.
    """
    values: dict[str, Any] = {} if path is None else _read_mapping(path)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, schema) for problem in error.errors())
        raise ConfigurationError(f"{path or 'engine settings'}: {problems}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key '{key}' stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}; check --extra-engine-args"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _describe(problem: Any, schema: type[EngineArgs]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(schema.model_fields))
        return f"unknown key '{key}' (known keys: {known})"
    return f"key '{key}': {problem['msg']}"
