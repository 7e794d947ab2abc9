"""A PD worker's and an encode worker's real parts in one process, without a request plane between them."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from trtllm_mm_cache.cache.flight import SingleFlight
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.scope import Scope
from trtllm_mm_cache.encode.maker import EncodeJob
from trtllm_mm_cache.encode.pipeline import EncodePipeline
from trtllm_mm_cache.engines.base import GenerationRequest, ItemDescription, SamplingParams
from trtllm_mm_cache.engines.transformers import (
    TransformersEngineArgs,
    TransformersGenerator,
    TransformersVisionEncoder,
)
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.runtime.drops import DropWatch
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.settings import EncodeSettings, PdSettings
from trtllm_mm_cache.tiers.base import MissingItem
from trtllm_mm_cache.tiers.chain import TierChain
from trtllm_mm_cache.tiers.encode_remote import EncodeTier
from trtllm_mm_cache.tiers.receive import Receiver
from trtllm_mm_cache.transfer import Exporter, MappedReader, TransferAgent

ARENA_BYTES = 1024**3


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Return a JPEG file with structure, another one for each seed."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass
class _EncodeWorkers:
    """The tier's `EncodeWorkers`: one, called as a function."""

    pipeline: EncodePipeline
    exporter: Exporter
    peer: dict[str, Any]
    instances: list[int] = field(default_factory=lambda: [1])

    async def encode(
        self, instance: int, request: EncodeRequest, unwanted: Callable[[EncodeReady], None]
    ) -> EncodeReady:
        """Encode and export, as `EncodeServer` does; what that imports of Dynamo is not needed here."""
        job = EncodeJob(
            request.key,
            request.media,
            request.processor_kwargs,
            request.variant,
            request.scope,
            request.fresh,
        )
        lease, origin = await self.pipeline.encode(job)
        rows, width = lease.shape
        metadata, dtype = lease.metadata, str(lease.dtype).removeprefix("torch.")
        export = await self.exporter.export(lease)
        return EncodeReady(
            fingerprint=request.fingerprint,
            key=request.key,
            peer=self.peer,
            **asdict(export),
            dtype=dtype,
            shape=(rows, width),
            grid_thw=metadata.grid_thw,
            placeholder=metadata.placeholder,
            encode_seconds=metadata.encode_seconds,
            origin=origin,
        )

    async def close(self) -> None:
        """Nothing waits."""


@dataclass
class NearStack:
    """Both halves of a model, the cache, and what is between them."""

    encoder: TransformersVisionEncoder
    generator: TransformersGenerator
    cache: MultimodalEmbeddingCacheManager
    reader: MappedReader
    tiers: TierChain
    tokenizer: AutoTokenizer
    fingerprint: str
    encodes: Callable[[], int]
    flights: SingleFlight[Lease] = field(
        default_factory=lambda: SingleFlight(share=Lease.clone, discard=Lease.release)
    )

    async def lease(self, media: bytes) -> Lease:
        """Return a lease on the embedding of an image's file, from the cache or through the encode side."""
        key = embedding_key(content_digest(media), fingerprint=self.fingerprint)
        found = self.cache.lease(key.hex)
        if found is not None:
            return found
        with Image.open(io.BytesIO(media)) as image:
            description = ItemDescription(*image.size, {})
        item = MissingItem(key, media, description, Scope(), DropWatch(None))
        lease, _ = await self.flights.run(key.hex, partial(self.tiers.load, item))
        return lease

    async def first_token(self, request: GenerationRequest, files: list[bytes]) -> tuple[int, int]:
        """Answer with one token; return it and how many tokens the prompt had."""
        leases = await asyncio.gather(*(self.lease(file) for file in files))
        try:
            tokens, length = (), 0
            async for delta in self.generator.generate(request, leases):
                tokens, length = tokens + tuple(delta.token_ids), delta.prompt_tokens
            return tokens[0], length
        finally:
            for lease in leases:
                lease.release()

    def request(self, images: int) -> GenerationRequest:
        """Return a prompt with `images` placeholders."""
        content = [
            part for _ in range(images) for part in ({"type": "image"}, {"type": "text", "text": "\n"})
        ]
        content.append({"type": "text", "text": "What is it?"})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return GenerationRequest("gpu_check", tuple(ids), text, SamplingParams(max_tokens=1))

    def text_request(self, tokens: int) -> GenerationRequest:
        """Return a prompt of `tokens` tokens and no image."""
        ids = self.tokenizer("a b c d e f g", add_special_tokens=False)["input_ids"]
        repeated = (ids * (tokens // len(ids) + 1))[:tokens]
        return GenerationRequest("gpu_check", tuple(repeated), None, SamplingParams(max_tokens=1))


@asynccontextmanager
async def near_stack(model: Path) -> AsyncIterator[NearStack]:
    """Load both halves and put the workers' parts together."""
    args = TransformersEngineArgs()
    encoder = await asyncio.to_thread(TransformersVisionEncoder, model, args)
    generator = await asyncio.to_thread(TransformersGenerator, model, args)
    encode_settings, pd_settings = EncodeSettings(model_path="none"), PdSettings(model_path="none")
    managers, agents = [], []
    for _ in range(2):
        managers.append(await asyncio.to_thread(MultimodalEmbeddingCacheManager, ARENA_BYTES))
        managers[-1].arena.page_lock()
        agents.append(await TransferAgent.start())
        await agents[-1].register(managers[-1].arena.base_address, managers[-1].arena.capacity_bytes)
    (exported, cache), (exporting, reading) = managers, agents
    encode_registry, registry = CollectorRegistry(), CollectorRegistry()
    pipeline = EncodePipeline(encoder, exported, encode_settings, encode_registry)
    exporter = Exporter(exporting, lease_timeout_s=30)
    peer = exporting.metadata.with_arena(exported.arena.place)
    workers = _EncodeWorkers(pipeline, exporter, peer.to_wire())
    fingerprint = pixels_fingerprint(generator.fingerprint, pd_settings.images)
    receiver = Receiver(cache, cache, None, generator.check_embedding, registry)
    reader = MappedReader(reading)
    tier = EncodeTier(workers, reader, fingerprint, pd_settings, registry)
    tiers = TierChain([tier], receiver)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encodes = partial(getattr, pipeline.maker.batcher, "items")
    try:
        yield NearStack(encoder, generator, cache, reader, tiers, tokenizer, fingerprint, encodes)
    finally:
        await tiers.close()
        await pipeline.close()
        await generator.close()
        encoder.close()
        for agent, manager in zip(agents, managers, strict=True):
            await agent.close(deadline_s=1)
            manager.close()
