"""Write docs/configuration.md from the settings classes, the click commands and the launch script's --help.

    python tools/configuration_reference.py [--check]

With --check nothing is written, and a file that differs is an error. `make docs` runs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import click
from pydantic import BaseModel

from settings_tables import flag_table, key_table, own_fields, table
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.settings import (
    ControlSettings,
    DropSettings,
    EncodeSettings,
    EngineSettings,
    FrontendSettings,
    PdSettings,
    RuntimeSettings,
    TopSettings,
)
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.settings import MediaSettings
from trtllm_mm_cache.settings import PlanSettings
from trtllm_mm_cache.transfer.environment import DEFAULT_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/configuration.md"

COMMANDS: dict[str, type[BaseModel]] = {
    "frontend": FrontendSettings,
    "encode": EncodeSettings,
    "pd": PdSettings,
    "drop": DropSettings,
    "top": TopSettings,
    "plan": PlanSettings,
}
# Limits of MediaSettings that the workers leave as they are; the others are flags of the workers.
FIXED_LIMITS = ("http_connect_timeout", "http_max_redirects", "http_max_connections")

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration_reference.py from the settings classes. Do not edit: run `make docs`. -->

Every process is set by command-line flags, the engine inside a worker by a YAML file of its own
([below](#engine-settings)). `trtllm-mm-cache COMMAND --help` says the same as this page: both come from the
settings classes.

- GB = 1024³ bytes, MB = 1024² bytes, s = seconds.
- A flag of type yes/no has a counterpart that begins with `--no-`; a switch takes no value; a repeatable flag
  is given once for each value.
- A variable of the environment counts where its flag is not given.
- An unknown flag and an unknown YAML key are refused at start, by name.
"""

ENGINES = """\
## Engine settings

The keys of the YAML file that `--extra-engine-args` names: one file for the encode worker (`encode.yaml`) and
one for the PD worker (`pd.yaml`). `configs/` has a pair for each model that was set up; the launch script
takes the pair of the model's name.
"""

TRTLLM = """\
Names and meanings are those of `tensorrt_llm.llmapi`. Only what the file gives is passed on: a key that is
left out has the engine's own default, which another release may change; see
[tensorrt-llm.md](tensorrt-llm.md).
"""

ENVIRONMENT = """\
## Environment

Variables that stand for a flag are in the tables above. Dynamo's and OpenTelemetry's own count as they do
elsewhere: `DYN_SYSTEM_PORT` is where a worker serves metrics and health; addresses and ports between hosts
are in [multi-host.md](multi-host.md), traces in [observability.md](observability.md#traces).
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *_commands(), *_engines(), *_environment(), *_fixed()])


def _commands() -> list[str]:
    return [
        "## Commands\n",
        *_shared("Every role: `frontend`, `encode`, `pd`, `drop`, `top`", RuntimeSettings),
        *_shared("Both workers: `encode`, `pd`", EngineSettings),
        *_shared("Both `drop` and `top`", ControlSettings),
        *(line for name, settings in COMMANDS.items() for line in _command(name, settings)),
        *_heading("ask"),
        _ask_table() + "\n",
    ]


def _shared(title: str, settings: type[BaseModel]) -> list[str]:
    summary = (settings.__doc__ or "").splitlines()[0]
    return [f"### {title}\n", f"{summary}\n", flag_table(settings, own_fields(settings)) + "\n"]


def _command(name: str, settings: type[BaseModel]) -> list[str]:
    return [*_heading(name), flag_table(settings, own_fields(settings)) + "\n"]


def _heading(name: str) -> list[str]:
    summary, _, _ = (cli.commands[name].help or "").partition("\n")
    return [f"### `trtllm-mm-cache {name}`\n", f"{summary}\n"]


def _ask_table() -> str:
    """Return the options of `ask`, the one command without a settings class."""
    rows = [["flag", "default", "variable", "meaning"]]
    for option in cli.commands["ask"].params:
        if isinstance(option, click.Option):
            default = "" if option.default is None else f"`{option.default}`"
            variable = f"`{option.envvar}`" if option.envvar else ""
            rows.append([f"`{option.opts[0]}`", default, variable, option.help or ""])
    return table(rows)


def _engines() -> list[str]:
    both = [name for name in TrtllmLlmArgs.model_fields if name in TrtllmEncoderArgs.model_fields]
    encode = [name for name in TrtllmEncoderArgs.model_fields if name not in both]
    pd = [name for name in TrtllmLlmArgs.model_fields if name not in both]
    return [
        ENGINES,
        "### transformers: `encode.yaml` and `pd.yaml`\n",
        "`dtype` and `embedding_dtype` decide an embedding's bytes and must be the same in both files.\n",
        key_table(TransformersEngineArgs, TransformersEngineArgs.model_fields) + "\n",
        "### TensorRT-LLM: `encode.yaml` and `pd.yaml`\n",
        TRTLLM,
        key_table(TrtllmLlmArgs, both) + "\n",
        "### TensorRT-LLM: `encode.yaml` alone\n",
        key_table(TrtllmEncoderArgs, encode) + "\n",
        "### TensorRT-LLM: `pd.yaml` alone\n",
        key_table(TrtllmLlmArgs, pd) + "\n",
    ]


def _environment() -> list[str]:
    usage = subprocess.run(
        [ROOT / "launch/disagg_e_pd.sh", "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    variables = [[f"`{name}`", f"`{value}`"] for name, value in DEFAULT_SETTINGS.items()]
    return [
        ENVIRONMENT,
        "### The launch script\n",
        f"```text\n{usage.rstrip()}\n```\n",
        "### NIXL and UCX\n",
        "Set by the workers where the environment says nothing; `transfer/environment.py` has the reasons.\n",
        table([["variable", "value"], *variables]) + "\n",
    ]


def _fixed() -> list[str]:
    return [
        "## Limits without a flag\n",
        "What the PD worker keeps to in fetching http(s) images (`media/settings.py`).\n",
        key_table(MediaSettings, FIXED_LIMITS) + "\n",
    ]


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
