"""Write docs/configuration.md from the settings classes.

    python tools/configuration_reference.py [--check]

With --check nothing is written, and a file that differs is an error. `make docs` runs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.engines.sglang import settings as sglang_settings
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.engines.vllm.settings import FORCED, VllmEngineArgs
from trtllm_mm_cache.flags import flag, is_constant, leaves
from trtllm_mm_cache.settings import (
    AskSettings,
    DropSettings,
    EncodeSettings,
    FrontendSettings,
    PdSettings,
    PlanSettings,
    ServeSettings,
)
from trtllm_mm_cache.transfer.environment import DEFAULT_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/configuration.md"

COMMANDS: dict[str, type[BaseModel]] = {
    "serve": ServeSettings,
    "frontend": FrontendSettings,
    "encode": EncodeSettings,
    "pd": PdSettings,
    "drop": DropSettings,
    "ask": AskSettings,
    "plan": PlanSettings,
}
TYPES = {int: "integer", float: "number", bool: "yes/no", str: "text", SecretStr: "text", Path: "path"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration_reference.py from the settings classes. Do not edit: run `make docs`. -->

Every process is set by command-line flags, the engine inside a worker by a YAML file of its own
([below](#engine-settings)). `trtllm-mm-cache COMMAND --help` says the same as this page: both come from the
settings classes.

- GB = 1024³ bytes, MB = 1024² bytes, s = seconds.
- A switch takes no value; a repeatable flag is given once for each value.
- A variable of the environment counts where its flag is not given.
- An unknown flag and an unknown YAML key are refused at start, by name.

## Commands
"""

ENGINES = """\
## Engine settings

The keys of the YAML file that `--extra-engine-args` names: one file for the encode worker (`encode.yaml`) and
one for the PD worker (`pd.yaml`). `configs/` has a pair for each model that was set up; the launch script
takes the pair of the model's name.

### transformers: `encode.yaml` and `pd.yaml`

`dtype` and `embedding_dtype` decide an embedding's bytes and must be the same in both files.
"""

TRTLLM = """\
### TensorRT-LLM

Names and meanings are those of `tensorrt_llm.llmapi`. Only what the file gives is passed on: a key that is
left out has the engine's own default, which another release may change; see
[tensorrt-llm.md](tensorrt-llm.md).
"""

VLLM = """\
### `--engine vllm`

Keys of `pd.yaml`; the encode worker runs `--engine transformers`.
"""

VLLM_FORCED = """\
What vLLM has a key for and this project decides:
"""

SGLANG = """\
### `--engine sglang`

Keys of `pd.yaml`; the encode worker runs `--engine transformers`.
"""

SGLANG_FORCED = """\
What SGLang has a key for and this project decides:
"""

ENVIRONMENT = """\
## Environment

Variables that stand for a flag are in the tables above. Dynamo's and OpenTelemetry's own count as they do
elsewhere: `DYN_FILE_KV` is the discovery folder of one machine, `DYN_REQUEST_PLANE` and
`DYN_EVENT_PLANE` are how processes talk; addresses and ports between hosts are in
[multi-host.md](multi-host.md), traces in [observability.md](observability.md#traces).

`launch/disagg_e_pd.sh` is `serve`, with a virtual environment made for it where the package is not
installed: it takes the same options and variables.
"""

NIXL = """\
### NIXL and UCX

Set by the workers where the environment says nothing; `transfer/environment.py` has the reasons.
"""

FIXED = """\
## Fixed values

What no flag changes, and why. A change is one line of `settings/`.
"""


def page() -> str:
    """Return the whole page."""
    variables = [[f"`{name}`", f"`{value}`"] for name, value in DEFAULT_SETTINGS.items()]
    parts = [
        INTRODUCTION,
        *_commands(),
        ENGINES,
        _key_table(("", TransformersEngineArgs)),
        TRTLLM,
        _key_table(("`encode.yaml`", TrtllmEncoderArgs), ("`pd.yaml`", TrtllmLlmArgs)),
        VLLM,
        _key_table(("", VllmEngineArgs)),
        VLLM_FORCED,
        _forced("vLLM", FORCED),
        SGLANG,
        _key_table(("", sglang_settings.SglangEngineArgs)),
        SGLANG_FORCED,
        _forced("SGLang", sglang_settings.FORCED),
        ENVIRONMENT,
        NIXL,
        _table(["variable", "value"], variables),
        FIXED,
        _fixed(),
    ]
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    """Yield the flags that several commands have in common, then each command with its own."""
    tables: dict[tuple[str, ...], list[list[str]]] = {(name,): [] for name in COMMANDS}
    for row, commands in _shared((name, _flag_rows(settings)) for name, settings in COMMANDS.items()):
        tables.setdefault(commands, []).append(list(row))
    for commands, rows in sorted(tables.items(), key=lambda item: -len(item[0])):
        if len(commands) > 1:
            yield f"### {', '.join(f'`{name}`' for name in commands)}\n"
        else:
            summary, _, _ = (cli.commands[commands[0]].help or "").partition("\n")
            yield f"### `trtllm-mm-cache {commands[0]}`\n\n{summary}\n"
        yield _table(["flag", "type", "default", "variable", "meaning"], rows)


def _flag_rows(settings: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for path, field in leaves(settings):
        if not is_constant(field):
            env = (field.json_schema_extra or {}).get("env")  # type: ignore[union-attr]
            switch = field.annotation is bool
            yield (
                f"`{flag(path[-1])}`",
                "switch" if switch else _type(field),
                "" if switch else _default(field),
                f"`{env}`" if env else "",
                field.description or "",
            )


def _forced(engine: str, keys: Mapping[str, str]) -> str:
    rows = [[f"`{key}`", why] for key, why in keys.items()]
    return _table([f"{engine}'s key", "why it is not one here"], rows)


def _key_table(*files: tuple[str, type[BaseModel]]) -> str:
    """Return the keys of YAML files, with a column that names the file where they differ."""
    rows = []
    for row, names in _shared((name, _key_rows(schema)) for name, schema in files):
        where = "both" if len(names) > 1 else names[0]
        rows.append([*row[:1], where, *row[1:]] if len(files) > 1 else [*row])
    return _table(["key", *(["file"] if len(files) > 1 else []), "type", "default", "meaning"], rows)


def _key_rows(schema: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in schema.model_fields.items():
        yield f"`{name}`", _type(field), _default(field), field.description or ""


def _fixed() -> str:
    rows = (
        (name, ((f"`{path[-1]}`", _default(field), field.description or "") for path, field in constants))
        for name, settings in COMMANDS.items()
        if (constants := [leaf for leaf in leaves(settings) if is_constant(leaf[1])])
    )
    table = [[row[0], ", ".join(f"`{name}`" for name in names), *row[1:]] for row, names in _shared(rows)]
    return _table(["setting", "of", "value", "why"], table)


def _shared(
    groups: Iterable[tuple[str, Iterable[tuple[str, ...]]]],
) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return each different row once, with the names of the groups that have it."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, rows in groups:
        for row in rows:
            found[row] = (*found.get(row, ()), name)
    return found.items()


def _table(heading: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table without the columns that are empty in every row."""
    body = list(rows)
    kept = [column for column in range(len(heading)) if any(row[column] for row in body)]
    lines = [[heading[column] for column in kept], ["---"] * len(kept)]
    lines += [[row[column].replace("|", "\\|") or "—" for column in kept] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(mark, name)}"
        for mark in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(mark, name)
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if get_origin(annotation) is tuple:
        return f"{_type_name(parts[0])}; repeatable"
    if get_origin(annotation) is dict:
        return "mapping"
    return _type_name(parts[0]) if parts else TYPES[annotation]  # an optional value: X | None


def _default(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        return "required"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, frozenset):
        return ", ".join(sorted(default))
    return f"{default:g}" if isinstance(default, int | float) else f"`{default}`"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is stale")
    text = page().rstrip() + "\n"
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET.relative_to(ROOT)} is not what the settings say any more: run `make docs`")


if __name__ == "__main__":
    main()
