"""Our connector with eyes: it keeps what vLLM's own tower made, and what was scheduled.

It runs in vLLM's processes; its folder is `WATCHED_FOLDER`. A load writes `loading` when it begins, and lasts
as long as there is a file `slow`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from trtllm_mm_cache.engines.vllm.connector import ArenaConnector, WorkerExtension

FOLDER = Path(os.environ.get("WATCHED_FOLDER", "."))
MOST_SECONDS = 60


class WatchedConnector(ArenaConnector):
    """See above."""

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        for name in scheduler_output.preempted_req_ids or ():
            with (FOLDER / "preempted").open("a") as file:
                file.write(f"{name}\n")
        return super().build_connector_meta(scheduler_output)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        loads = self._get_connector_metadata().loads
        if loads:
            with (FOLDER / f"loads.{os.getpid()}").open("a") as file:
                file.writelines(f"{identifier}\n" for identifier, _ in loads)
            (FOLDER / "loading").touch()
            end = time.monotonic() + MOST_SECONDS
            while (FOLDER / "slow").exists() and time.monotonic() < end:
                time.sleep(0.01)
        super().start_load_caches(encoder_cache, **kwargs)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        partial = FOLDER / f"{mm_hash}.partial"
        torch.save(encoder_cache[mm_hash].detach().clone(), partial)
        partial.rename(FOLDER / f"{mm_hash}.pt")


class WatchedExtension(WorkerExtension):
    """What tests ask vLLM's workers besides."""

    model_runner: Any

    def weights(self) -> int:
        """Return the bytes of the model's weights."""
        return sum(each.nbytes for each in self.model_runner.get_model().parameters())
