"""Variables of the environment that this project or what it is built on reads."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import PurePosixPath

from tests.docs.documents import ROOT, tracked_files
from trtllm_mm_cache.settings import EncodeSettings, FrontendSettings, PdSettings, TopSettings

CODE = ("src", "launch", "tests", "tools", "benchmarks", "Makefile", "pyproject.toml")
CODE_SUFFIXES = (".py", ".sh", ".toml", "")
# Variables that belong to others: Dynamo, UCX and NIXL, etcd, OpenTelemetry, CUDA, Hugging Face, the engines.
FOREIGN_VARIABLES = ("DYN_", "UCX_", "NIXL_", "ETCD_", "OTEL_", "CUDA_", "HF_", "TLLM_", "OPENAI_", "PYTHON")


def is_launch_variable(name: str) -> bool:
    """Whether the launch script, a flag that it passes on or another program reads the variable."""
    settings = (FrontendSettings, EncodeSettings, PdSettings, TopSettings)
    extras = [field.json_schema_extra for each in settings for field in each.model_fields.values()]
    flags = {extra["env"] for extra in extras if isinstance(extra, dict) and "env" in extra}
    return name.startswith(FOREIGN_VARIABLES) or name in {*launch_variables(), *flags}


def is_read(name: str) -> bool:
    """Whether the code of this project has the name anywhere, or another program reads it."""
    return is_launch_variable(name) or name in make_variables() or name in _names_in_code()


@cache
def launch_variables() -> frozenset[str]:
    """The variables that the launch script's --help lists, each at the start of a line."""
    usage = subprocess.run(
        [ROOT / "launch/disagg_e_pd.sh", "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    names = [line.split("   ")[0].strip() for line in usage.splitlines() if line.startswith("  ")]
    return frozenset(
        part for name in names for part in name.split(", ") if part.isupper() and part.isidentifier()
    )


@cache
def make_variables() -> frozenset[str]:
    """The variables that the Makefile lets its caller set."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return frozenset(line.partition("?=")[0].strip() for line in lines if "?=" in line)


@cache
def _names_in_code() -> frozenset[str]:
    """All names in the code, its comments and texts included."""
    here = PurePosixPath(__file__).relative_to(ROOT).parent
    paths = [path for path in tracked_files() if path.parts[0] in CODE and here not in path.parents]
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in paths if path.suffix in CODE_SUFFIXES]
    return frozenset(name for text in texts for name in re.split(r"\W+", text))
