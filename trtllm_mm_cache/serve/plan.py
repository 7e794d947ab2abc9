"""What `serve` is going to run: the engine, model and files that the settings mean, and each command line."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_mm_cache.engines.registry import find_engine
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.flags import arguments, flag
from trtllm_mm_cache.serve.model import demo_model, model_config, shipped
from trtllm_mm_cache.settings import (
    EngineName,
    EngineSettings,
    FrontendSettings,
    PdSettings,
    ServeSettings,
)

_TRTLLM_MODEL = "llava-hf/llava-v1.6-mistral-7b-hf"
_WITHOUT_ENCODERS: Mapping[str, str] = {"vllm": "tensor_parallel_size", "sglang": "tp_size"}
"""Engines that take the embeddings of transformers' towers, and their keys for several ranks."""
# trtllm-llmapi-launch expands its command unquoted: a shell splits and globs it a second time.
_UNSAFE_FOR_SHELL = set("'\"\\*?[] \t\n")


@dataclass(frozen=True)
class Plan:
    """The settings with everything in its place, and what follows from them."""

    settings: ServeSettings
    engine: EngineName
    encode_engine: EngineName
    model: str

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.settings.served_model_name or Path(self.model).name

    @property
    def url(self) -> str:
        """Where the frontend is reached from this machine."""
        host = self.settings.http_host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"http://{host}:{self.settings.http_port}"

    @property
    def is_demo(self) -> bool:
        """Whether the model is our own, which knows drawn cards alone."""
        return Path(self.model) == demo_model()

    def frontend_arguments(self) -> list[str]:
        """Return the command line of the frontend."""
        own = [flag("pd_endpoint"), self.settings.endpoint]
        return ["frontend", *arguments(self.settings, FrontendSettings), *own]

    def encode_arguments(self) -> list[str]:
        """Return the command line of an encode worker."""
        theirs = {"engine": self.encode_engine, "extra_engine_args": self.settings.encode_engine_args}
        common = self.settings.model_copy(update=theirs)
        own = [flag("endpoint"), self.settings.encode_endpoint]
        return [
            "encode",
            *arguments(common, EngineSettings),
            *own,
            *shlex.split(self.settings.encode_extra_args),
        ]

    def pd_arguments(self) -> list[str]:
        """Return the command line of a PD worker."""
        return ["pd", *arguments(self.settings, PdSettings)]

    def job(self) -> list[str]:
        """Return what starts a PD worker of several ranks, to stand before its command; [] for one rank.

        Raises `ConfigurationError` where that cannot work.
        """
        if self.settings.pd_ranks == 1:
            return []
        if shutil.which("mpirun") is None:
            raise ConfigurationError(
                f"PD_RANKS={self.settings.pd_ranks} needs mpirun: pip install 'trtllm-mm-cache[mpi]'"
            )
        # Without --bind-to none mpirun holds all threads of a rank to one core.
        command = ["mpirun", "-n", str(self.settings.pd_ranks), "--bind-to", "none"]
        if os.geteuid() == 0:
            command.append("--allow-run-as-root")
        if (os.cpu_count() or 1) < self.settings.pd_ranks:
            command.append("--oversubscribe")
        if self.engine == "trtllm":
            for argument in self.pd_arguments():
                if _UNSAFE_FOR_SHELL & set(argument):
                    raise ConfigurationError(
                        f"'{argument}' would not survive trtllm-llmapi-launch: with PD_RANKS use no spaces, "
                        "quotes, backslashes or * ? ["
                    )
            command.append("trtllm-llmapi-launch")
        return command


def make_plan(settings: ServeSettings) -> Plan:
    """Decide what runs, and look at the files it needs; imports no engine, contacts nobody.

    Raises `ConfigurationError` for a missing package, model or tokenizer, and for a YAML file or a model that
    the engine would refuse.
    """
    name = settings.engine or _best_engine()
    encode_name = settings.encode_engine or ("transformers" if name in _WITHOUT_ENCODERS else name)
    _check_mode(settings, name)
    engine, encode_engine = find_engine(name), find_engine(encode_name)
    _check_installed("ENGINE", name)
    if settings.encode_python is None:
        _check_installed("ENCODE_ENGINE", encode_name)
    elif not os.access(settings.encode_python, os.X_OK):
        raise ConfigurationError(f"ENCODE_PYTHON={settings.encode_python} cannot be run: name a Python")
    model = settings.model_path or (_TRTLLM_MODEL if name == "trtllm" else str(demo_model()))
    pd_file = settings.extra_engine_args or _engine_file(model, name, "pd.yaml")
    encode_file = settings.encode_engine_args or _engine_file(model, name, "encode.yaml")
    for variable, file in (("PD_ENGINE_ARGS", pd_file), ("ENCODE_ENGINE_ARGS", encode_file)):
        if not file.is_file():
            raise ConfigurationError(
                f"there is no engine configuration {file}; set {variable} to one (see configs/)"
            )
    config = model_config(model)
    engine.check("pd", config, pd_file)
    if not settings.is_aggregated:
        encode_engine.check("encode", config, encode_file)
    decided = {
        "engine": name,
        "encode_workers": 0 if settings.is_aggregated else settings.encode_workers,
        "model_path": model,
        "extra_engine_args": pd_file,
        "encode_engine_args": encode_file,
        "served_model_name": settings.served_model_name or Path(model).name,
    }
    plan = Plan(settings.model_copy(update=decided), name, encode_name, model)
    plan.job()
    return plan


def _check_mode(settings: ServeSettings, engine: EngineName) -> None:
    if settings.is_aggregated and engine != "vllm":
        raise ConfigurationError(
            f"--disaggregation-mode agg: the engine {engine} has no vision tower of its own; set ENGINE=vllm"
        )
    if engine in _WITHOUT_ENCODERS and settings.pd_ranks > 1:
        raise ConfigurationError(
            f"PD_RANKS={settings.pd_ranks}: the engine {engine} starts its ranks itself; set "
            f"{_WITHOUT_ENCODERS[engine]} in the YAML file of the PD workers (PD_ENGINE_ARGS)"
        )


def _check_installed(variable: str, name: EngineName) -> None:
    package = find_engine(name).PACKAGE
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"{variable}={name} needs the Python package {package}: pip install 'trtllm-mm-cache[{name}]'"
        )


def _best_engine() -> EngineName:
    """TensorRT-LLM where it is installed and `nvidia-smi` lists a GPU."""
    if importlib.util.find_spec("tensorrt_llm") is None or shutil.which("nvidia-smi") is None:
        return "transformers"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False)
    return "trtllm" if listed.returncode == 0 else "transformers"


def _engine_file(model: str, engine: EngineName, name: str) -> Path:
    """Return where the file lies that is meant when none is named; `engine` is the PD workers'."""
    for_any = engine == "transformers" or (engine in _WITHOUT_ENCODERS and Path(model) == demo_model())
    folder = shipped("configs") / ("cpu-demo" if for_any else Path(model).name.lower())
    return folder / engine / name if engine in _WITHOUT_ENCODERS else folder / name
