"""Every rank but the first of a tensor-parallel worker: no endpoint, no cache, no NIXL, only its share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from trtllm_mm_cache.cache.arena.handle import OpenArenas
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import first_line, read_config
from trtllm_mm_cache.engines.ranks import Place, place_in_job
from trtllm_mm_cache.engines.transformers.features import encoder_output
from trtllm_mm_cache.engines.transformers.loading import load_text_half
from trtllm_mm_cache.engines.transformers.lockstep import (
    Decision,
    FollowedEnd,
    FollowedToken,
    RankReport,
    Work,
)
from trtllm_mm_cache.engines.transformers.peers import Peers
from trtllm_mm_cache.engines.transformers.rendezvous import COLLECTIVE_DEADLINE_S, meet_leader
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.errors import ConfigurationError

# mpirun sends every signal to every rank; rank 0 drains and then tells the others that it is over.
_LEFT_TO_RANK_0 = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Follower:
    """The language half on one of the ranks, and the arenas of rank 0 that it has opened."""

    def __init__(self, place: Place, peers: Peers, model_path: Path, args: TransformersEngineArgs) -> None:
        """Load this rank's share of the model. Raises `ConfigurationError`."""
        config, architecture = read_config(model_path)
        self._peers = peers
        self._model: Any = load_text_half(model_path, config, architecture, args, ranks=place.size)
        self._model.generation_config = GenerationConfig()
        self._layout = FeatureLayout.of(config, architecture, args.resolved_embedding_dtype())
        self._arenas = OpenArenas()

    def compute(self, work: Work) -> None:
        """Run one request in step with rank 0."""
        inputs: dict[str, Any] = {name: torch.tensor(value) for name, value in work.numbers.items()}
        if work.embeddings:
            tensors = [self._arenas.tensor(handle) for handle in work.embeddings]
            inputs["mm_encoder_outputs"] = {"image": encoder_output(self._layout, tensors)}
        token = FollowedToken(self._receive_decision)
        self._model.generate(
            **inputs,
            generation_config=work.limits.generation_config(),
            logits_processor=LogitsProcessorList([token]),
            stopping_criteria=StoppingCriteriaList([FollowedEnd(token)]),
        )

    def _receive_decision(self) -> Decision:
        decision: Decision = self._peers.receive(COLLECTIVE_DEADLINE_S)
        return decision


def follow(args: TransformersEngineArgs) -> None:
    """Compute until rank 0 ends the worker; then the process is to end too. Blocking.

    Raises `ConfigurationError` where rank 0 does. When rank 0 is lost, the process ends: see `peers`.
    """
    for number in _LEFT_TO_RANK_0:
        signal.signal(number, signal.SIG_IGN)
    place = place_in_job()
    connection, model_path = meet_leader(place)
    peers = Peers(place.rank, {0: connection})
    follower = _load(place, peers, model_path, args)
    while (work := peers.receive()) is not None:
        try:
            follower.compute(work)
        except Exception as error:  # noqa: BLE001 - it ends the process
            peers.fail(f"{type(error).__name__}: {first_line(error)}")
        peers.send(RankReport())


def _load(place: Place, peers: Peers, model_path: Path, args: TransformersEngineArgs) -> Follower:
    """Load and say so. What is wrong here is wrong on rank 0, or is told to it: it alone prints."""
    try:
        follower = Follower(place, peers, model_path, args)
    except ConfigurationError as error:
        peers.send(RankReport(f"rank {place.rank}: {error}"))
        peers.receive()
        sys.exit(2)
    peers.send(RankReport())
    return follower
