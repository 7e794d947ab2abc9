"""NIXL's environment, set in Python, and its import.

UCX and NIXL read their settings from the process environment when the first NIXL agent is made. They are
set here, not in a launch script, because `trtllm-llmapi-launch` strips `UCX_*` before our code runs.

The CUDA-flavoured module is imported directly: the meta package `nixl` imports torch to choose a flavour
(3.1 s and 242 MB against 0.36 s and 48 MB), which an encode or PD worker decides without it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_mm_cache.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS: Mapping[str, str] = {
    # Both would write to stdout, which belongs to the program: NIXL its INFO lines, UCX everything.
    "NIXL_LOG_LEVEL": "WARN",
    "UCX_LOG_FILE": "stderr",
    # With UCX's own keep-alive on, an exporter that stood still while a reader was killed in the middle of
    # a READ over TCP aborts when it goes on ("Fatal: unexpected error: Endpoint timeout"): 9 of 9 times, with
    # it off 0 of 24. Nothing is lost by that: a killed peer shows by its closed connection either way, and a
    # host without power was not noticed within 80 s either way.
    "UCX_KEEPALIVE_INTERVAL": "inf",
}

_TCP_SETTINGS: Mapping[str, str] = {
    # READs over TCP run at 1.5 GB/s with 64k segments and at 0.7 GB/s with UCX's default of 8k.
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "64k",
}

_SHARED_MEMORY = ("posix", "cma", "self")
_COPIES_TO_GPU = "cuda_copy"
"""NIXL refuses a choice without it on a host with a GPU."""
_NVIDIA_DRIVER = Path("/dev/nvidiactl")

_PREFIXES = ("UCX_", "NIXL_")


@dataclass(frozen=True)
class NixlLibrary:
    """The imported NIXL module and the exceptions that the transfer protocol tells apart.

    `errors` are all exceptions that NIXL raises on purpose; `disconnected` and `not_found` are two of them.
    """

    module: Any
    errors: tuple[type[Exception], ...]
    disconnected: type[Exception]
    not_found: type[Exception]


def prepare_environment(settings: Mapping[str, str] | None = None) -> None:
    """Put `UCX_*` and `NIXL_*` settings into the process environment.

    `settings` win over what the environment holds, which wins over `DEFAULT_SETTINGS`. Has no effect on NIXL
    agents that exist already. Raises `ConfigurationError` for a name that is neither UCX's nor NIXL's.
    """
    for name, value in (settings or {}).items():
        if not name.startswith(_PREFIXES):
            raise ConfigurationError(
                f"'{name}' is not a transport setting: only names that begin with UCX_ or NIXL_ are passed on"
            )
        os.environ[name] = value
    # UCX warns of settings of a transport that it does not use.
    defaults = DEFAULT_SETTINGS if uses_shared_memory_alone() else {**DEFAULT_SETTINGS, **_TCP_SETTINGS}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def one_machine_transports() -> str:
    """Return the UCX_TLS for processes of one user on one machine: shared memory alone, no port is opened.

    UCX authenticates nobody: who reaches a TCP port of its own can READ and WRITE the memory of the process.
    Shared memory has the kernel's access rights instead, and other users are let to nothing.
    """
    gpu = (_COPIES_TO_GPU,) if _NVIDIA_DRIVER.exists() else ()
    return ",".join((*_SHARED_MEMORY, *gpu))


def check_transports() -> None:
    """Raise `ConfigurationError` for a UCX_TLS that NIXL would refuse on this host, with the one to set."""
    named = os.environ.get("UCX_TLS", "all")
    copies = named.startswith("^") or {"all", "cuda", _COPIES_TO_GPU} & set(named.split(","))
    if _NVIDIA_DRIVER.exists() and not copies:
        raise ConfigurationError(
            f"UCX_TLS={named} has no transport for the memory of this host's GPU, and NIXL does not start "
            f"without one: set UCX_TLS={named},{_COPIES_TO_GPU}"
        )


def uses_shared_memory_alone() -> bool:
    """Whether UCX_TLS, as the environment has it, names transports within one machine alone."""
    named = set(os.environ.get("UCX_TLS", "all").split(","))
    return named <= {*_SHARED_MEMORY, "sm", "shm", "sysv", _COPIES_TO_GPU}


def load_nixl() -> NixlLibrary:
    """Import NIXL: the flavour that is loaded already, else that of the loaded torch, else CUDA 13, else 12.

    Takes about 0.4 s once. Call `prepare_environment` before. Raises `ConfigurationError` when neither
    flavour can be imported.
    """
    failures: list[str] = []
    for name in _flavours():
        try:
            module = importlib.import_module(name)
            bindings = importlib.import_module(f"{name}._bindings")
        except ImportError as error:
            logger.debug("%s cannot be imported", name, exc_info=error)
            missing = isinstance(error, ModuleNotFoundError)
            failures.append(f"{name} {'is not installed' if missing else 'does not load'}")
            continue
        return _library(module, bindings)
    raise ConfigurationError(
        f"NIXL cannot be imported ({', '.join(failures)}); install the Python package nixl, "
        "and see the debug log for what a module that does not load is missing"
    )


def _flavours() -> tuple[str, ...]:
    """The modules to try, in order. Both work without CUDA; two CUDA majors in one process would not."""
    loaded = tuple(name for name in ("nixl_cu13", "nixl_cu12") if sys.modules.get(name) is not None)
    if loaded:
        return loaded  # NIXL's types can be registered once in a process: the second flavour does not load
    torch = sys.modules.get("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    if isinstance(cuda, str) and cuda.startswith("12."):
        return ("nixl_cu12", "nixl_cu13")
    return ("nixl_cu13", "nixl_cu12")


def _library(module: Any, bindings: Any) -> NixlLibrary:
    errors = tuple(
        value for value in vars(bindings).values() if isinstance(value, type) and issubclass(value, Exception)
    )
    return NixlLibrary(
        module=module,
        errors=errors,
        disconnected=bindings.nixlRemoteDisconnectError,
        not_found=bindings.nixlNotFoundError,
    )
