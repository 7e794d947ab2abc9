"""What every rank of a test's mpirun job runs: `python -m tests.mpi.job SCENARIO MODEL_DIR FOLDER`.

Every rank but the first is the product's own follower. Rank 0 has both halves of the model and a cache,
runs the scenario with its generator and leaves the result in the folder, which holds the engine's settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from trtllm_mm_cache.engines.ranks import place_in_job
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.observability.logs import configure_logging

ARENA_BYTES = 64 << 20


def ranks_of_this_job() -> Iterator[int]:
    """Yield the pids of mpirun's children: this process and the other ranks."""
    for entry in Path("/proc").iterdir():
        # Any process of the machine may end between being listed and being read.
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getppid():
                yield pid


async def lead(scenario: str, model_dir: Path, folder: Path) -> None:
    """Run a scenario on rank 0."""
    import torch

    from tests.engines.conftest import Halves
    from tests.mpi import scenarios
    from trtllm_mm_cache.cache.manager import MultimodalEmbeddingCacheManager
    from trtllm_mm_cache.engines.transformers import load_generator, load_vision_encoder

    generator = load_generator(model_dir, folder / "pd.yaml")
    encoder = load_vision_encoder(model_dir, folder / "pd.yaml")
    halves = Halves(model_dir, encoder, generator, MultimodalEmbeddingCacheManager(ARENA_BYTES))
    print("ranks", *ranks_of_this_job(), flush=True)
    if scenario == "talk":
        await scenarios.talk(halves)
    result = await scenarios.answers(halves)
    pids = [pid for pid in ranks_of_this_job() if pid != os.getpid()]
    result["arena"] = next(
        file
        for addresses, file in scenarios.shared_mappings(os.getpid())
        if halves.cache.arena.base_address in addresses
    )
    result["followers"] = [{file for _, file in scenarios.shared_mappings(pid)} for pid in pids]
    result["resident"] = [scenarios.shared_resident_bytes(pid) for pid in (os.getpid(), *pids)]
    await generator.close()
    torch.save(result, folder / "result.pt")


def main() -> None:
    """Be the rank that mpirun made this process."""
    scenario, model_dir, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    configure_logging("INFO")
    if scenario == "two-nodes":
        name = f"node-{place_in_job().rank}"
        socket.gethostname = lambda: name
    if place_in_job().rank > 0:
        load_engine("transformers").follow(folder / "pd.yaml")
    else:
        asyncio.run(lead(scenario, model_dir, folder))


if __name__ == "__main__":
    main()
