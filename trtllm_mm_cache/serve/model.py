"""What can be seen of a model before anything loads it, and what this package brings along."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_mm_cache.engines.fingerprint import weight_files
from trtllm_mm_cache.errors import ConfigurationError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return where `configs` or `models` lies: in the installed package, else in the repository."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def demo_model() -> Path:
    """Return the directory of the demo model."""
    return shipped("models") / "shapes-qwen2-vl"


def model_config(model: str) -> Mapping[str, Any]:
    """Return the config.json of a model directory, or of a hub name that was downloaded before.

    Of one that was not it returns the empty mapping. Raises `ConfigurationError` for a
    directory without what the processes need: configuration, weights, tokenizer, image processor.
    """
    folder = Path(model)
    if folder.is_dir():
        return _checked(folder)
    if (
        folder.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") != 1
        or folder.parent.is_dir()
    ):
        raise ConfigurationError(
            f"MODEL_PATH={model} is not a directory; name one, or a model of the hub as OWNER/NAME"
        )
    snapshots = sorted(_hub_folder(model).glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    if not snapshots and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise ConfigurationError(
            f"MODEL_PATH={model} is not a directory, and HF_HUB_OFFLINE is set: download it first"
        )
    files = [folder / "config.json" for folder in snapshots if (folder / "config.json").is_file()]
    return dict(json.loads(files[-1].read_bytes())) if files else {}


def _checked(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        weight_files(folder)
    except OSError as error:
        raise _incomplete(folder, "config.json") from error
    except ValueError as error:
        raise ConfigurationError(f"MODEL_PATH={folder}: its config.json is not JSON: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"MODEL_PATH={folder}: {error}") from error
    for what, names in (("tokenizer", _TOKENIZERS), ("image processor", _PROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            raise _incomplete(folder, f"{what} ({' or '.join(names)})")
    if not isinstance(config, dict):
        raise ConfigurationError(f"MODEL_PATH={folder}: its config.json is not a JSON object")
    return config


def _incomplete(folder: Path, what: str) -> ConfigurationError:
    return ConfigurationError(f"MODEL_PATH={folder} has no {what}: download the whole model")


def _hub_folder(model: str) -> Path:
    """Return where the hub's client keeps a model (docs of huggingface_hub, "Manage your cache")."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
