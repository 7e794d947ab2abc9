"""What to say when discovery names no worker: where it was looked for, and what to do."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from trtllm_mm_cache.errors import MmCacheError
from trtllm_mm_cache.settings import ControlSettings


class NoWorkerFoundError(MmCacheError):
    """Discovery names no worker."""

    code = "no_worker_found"


def no_worker_found(settings: ControlSettings) -> NoWorkerFoundError:
    """Return the error of a command that needs workers and found none where `settings` look for them."""
    found = f"no worker of {settings.endpoint} or {settings.encode_endpoint} was found"
    where, way_out = _place(settings)
    return NoWorkerFoundError(
        f"{found} {where} within {settings.discovery_wait_s:g} s. This command must look where the workers "
        f"register: {way_out}"
    )


def _place(settings: ControlSettings) -> tuple[str, str]:
    """Return where discovery looks, and the way out, as parts of a sentence."""
    match settings.discovery_backend:
        case "file":
            return _folder(), (
                "set DYN_FILE_KV to their folder (launch/disagg_e_pd.sh prints the line to copy), or "
                "DYN_DISCOVERY_BACKEND if they use another kind of discovery"
            )
        case "etcd":
            servers = os.environ.get("ETCD_ENDPOINTS", "http://localhost:2379, ETCD_ENDPOINTS not being set")
            return f"in etcd ({servers})", "set ETCD_ENDPOINTS as they have it"
        case "kubernetes":
            return f"among the ready pods of the namespace {os.environ.get('POD_NAMESPACE', 'default')}", (
                "run it in one of their pods (kubectl exec), and look at the pods' readiness"
            )
        case "mem":
            return "in this process's own memory", "`mem` cannot reach another process; use `file` or `etcd`"


def _folder() -> str:
    """Return the folder that Dynamo looks into: DYN_FILE_KV, or one below the folder for temporary files."""
    named = os.environ.get("DYN_FILE_KV")
    folder = named or Path(tempfile.gettempdir(), "dynamo_store_kv")
    return f"in {folder} ({'DYN_FILE_KV' if named else 'DYN_FILE_KV is not set'})"
