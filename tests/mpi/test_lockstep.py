"""Rank discovery, plans and messages, without mpirun."""

from __future__ import annotations

import contextlib
import pickle
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoConfig

from tools.tiny_models import make_tiny_model
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.ranks import Place, place_in_job
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.engines.transformers.lockstep import Limits, Work
from trtllm_mm_cache.engines.transformers.peers import Peers
from trtllm_mm_cache.engines.transformers.tensor_parallel import check_divisible
from trtllm_mm_cache.errors import ConfigurationError


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Place(1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, Place(3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1"}, Place(0, 1)),
    ],
    ids=["alone", "open-mpi", "mpich", "half"],
)
def test_the_place_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: Place
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_in_job() == place


def test_a_request_for_other_ranks_holds_no_embedding() -> None:
    cache = MultimodalEmbeddingCacheManager(64 << 20)
    embedding = torch.rand(4096, 2048)
    assert cache.set("image", CachedEmbedding(embedding))
    lease = cache.lease("image")
    assert lease is not None
    inputs = {"input_ids": torch.arange(4100)[None], "mm_encoder_outputs": {"image": lease.tensor}}
    work = Work.of(inputs, [lease.handle()], Limits(max_new_tokens=8))
    assert len(pickle.dumps(work)) < 32 * 1024 < embedding.nbytes / 1000
    assert set(work.numbers) == {"input_ids"}
    assert work.embeddings[0].offset == lease.offset
    assert work.embeddings[0].shape == (4096, 2048)
    lease.release()
    cache.close()


class CountedPeers(Peers):
    """Takes note of a peer that says nothing, instead of ending the process."""

    silences = 0

    def lose(self, what: str) -> NoReturn:
        self.silences += 1
        raise TimeoutError(what)


def test_a_wait_for_a_peer_ends_at_its_deadline() -> None:
    """Again and again: `queue.SimpleQueue` waits for ever if its lock is free and the deadline soon over."""
    ours, theirs = Pipe()
    peers = CountedPeers(1, {0: ours})

    def wait_often() -> None:
        for number in range(40_000):
            theirs.send(number)
            assert peers.receive(10) == number
            with contextlib.suppress(TimeoutError):
                peers.receive(1e-6)

    waiting = threading.Thread(target=wait_often, daemon=True)
    waiting.start()
    waiting.join(60)
    assert peers.silences == 40_000, "a wait did not end"
    peers.announce_end()
    theirs.close()
    assert peers.wait_gone(10)


def test_a_model_without_a_plan_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_tiny_model("qwen3_vl", tmp_path / "model"))
    config.get_text_config().base_model_tp_plan = None  # which models have one depends on the release
    with pytest.raises(
        ConfigurationError, match="no tensor-parallel plan for the language model of qwen3_vl"
    ):
        check_divisible(config, 2)


def test_key_heads_must_divide_too(tmp_path: Path) -> None:
    """Four heads with two keys between them: over four ranks the keys would be cut."""
    config = AutoConfig.from_pretrained(make_tiny_model("qwen2_vl", tmp_path / "model"))
    check_divisible(config, 2)
    with pytest.raises(ConfigurationError, match=r"2 heads \(num_key_value_heads\) .* over 4 ranks"):
        check_divisible(config, 4)


def test_tensorrt_llm_names_its_own_launcher() -> None:
    with pytest.raises(ConfigurationError, match="mpirun -n N trtllm-llmapi-launch"):
        load_engine("trtllm").follow(None)
