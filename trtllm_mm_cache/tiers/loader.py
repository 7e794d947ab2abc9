"""Step 5 for one missing embedding: whom to ask for it, and whom after that.

The encode worker that the key chooses is asked first, and once more the next one if that can help. Those that
are not there any more, though discovery still lists them, and those whose breaker is open are passed over.
What one has ready is READ and committed as part of the same attempt: steps 6 and 7, in `receiver.py`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from trtllm_mm_cache.cache.key import EmbeddingKey
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cache.what_if import WhatIf
from trtllm_mm_cache.errors import (
    ChecksumMismatchError,
    EmbeddingMismatchError,
    EncodeError,
    EncodeTimeoutError,
    EncodeUnavailableError,
    EncodeUnreachableError,
    MmCacheError,
    TransferError,
)
from trtllm_mm_cache.pd.metrics import PdMetrics
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest
from trtllm_mm_cache.tiers.breaker import BreakerStatistics, CircuitBreakers
from trtllm_mm_cache.tiers.missing_image import MissingItem
from trtllm_mm_cache.tiers.receiver import EmbeddingCheck, EmbeddingReceiver
from trtllm_mm_cache.transfer import Reader

logger = logging.getLogger(__name__)

_ATTEMPTS = 2


@dataclass(frozen=True)
class LoaderStatistics:
    """Counts since start. `uncached` embeddings were served without entering the cache."""

    retries: int
    uncached: int


class EncodeWorkers(Protocol):
    """The encode workers, as the loader sees them; `EncodeClient` are the real ones."""

    def rank(self, key: EmbeddingKey) -> list[int]:
        """Return the instances that are alive, in the order in which to ask them for `key`."""
        ...

    async def encode(self, instance: int, request: EncodeRequest) -> EncodeReady:
        """Ask one instance for one embedding."""
        ...

    async def close(self) -> None:
        """Stop waiting for answers."""
        ...


class EmbeddingLoader:
    """Loads missing embeddings for one PD worker. For use from one event loop.

    What it brings lies in `cache` or in `transit`; see `EmbeddingReceiver`.
    """

    def __init__(
        self,
        *,
        cache: MultimodalEmbeddingCacheManager,
        transit: MultimodalEmbeddingCacheManager,
        encoders: EncodeWorkers,
        breakers: CircuitBreakers,
        reader: Reader,
        fingerprint: str,
        check: EmbeddingCheck,
        reject_non_finite: bool,
        encode_timeout_s: float,
        transfer_timeout_s: float,
        metrics: PdMetrics | None = None,
        what_if: WhatIf | None = None,
    ) -> None:
        self._encoders = encoders
        self._breakers = breakers
        self._fingerprint = fingerprint
        self._encode_timeout_s = encode_timeout_s
        self._metrics = metrics or PdMetrics()
        self._retries = 0
        self._receiver = EmbeddingReceiver(
            cache=cache,
            transit=transit,
            reader=reader,
            check=check,
            reject_non_finite=reject_non_finite,
            timeout_s=transfer_timeout_s,
            metrics=self._metrics,
            what_if=what_if,
        )

    def statistics(self) -> LoaderStatistics:
        """Return a snapshot."""
        return LoaderStatistics(self._retries, self._receiver.uncached)

    def breakers(self) -> BreakerStatistics:
        """Return a snapshot of the encode workers' breakers."""
        return self._breakers.statistics()

    async def close(self) -> None:
        """Stop waiting for answers that nobody wants."""
        await self._encoders.close()

    async def load(self, image: MissingItem) -> Lease:
        """Return a lease on the embedding of `image`, made by an encode worker.

        The first of two attempts gets half of the time, the last one what is left. Raises the last
        attempt's error, `EncodeUnavailableError` at once when no instance is alive or admitted.
        """
        ranked = self._encoders.rank(image.key)
        self._breakers.keep(ranked)
        alone, left = len(ranked) == 1, _ATTEMPTS
        give_up_at = asyncio.get_running_loop().time() + self._encode_timeout_s
        failure: MmCacheError | None = None
        for instance in ranked * _ATTEMPTS if alone else ranked:
            if not self._breakers.admits(instance):
                continue
            if failure is not None:
                self._retries += 1
                logger.warning("embedding %s…: %s; trying once more", image.key.hex[:12], failure.code)
            try:
                with self._breakers.calling(instance):
                    request = self._request(image, fresh=_was_wrong(failure))
                    return await self._attempt(instance, image, request, give_up_at, 1 if alone else left)
            except EncodeUnreachableError as error:
                failure = error  # it took no time and has not seen the image: not an attempt
            except MmCacheError as error:
                failure = error
                left -= 1
                if not left or not _another_attempt_helps(error, alone=alone):
                    break
        raise failure or _unavailable(ranked)

    def _request(self, image: MissingItem, *, fresh: bool) -> EncodeRequest:
        tag = image.passage.tag
        return EncodeRequest(
            fingerprint=self._fingerprint,
            key=image.key.hex,
            media=image.media,
            processor_kwargs=dict(image.description.processor_kwargs),
            variant=image.description.variant,
            retain=image.retained,
            fresh=fresh,
            salt_tag=None if tag is None else tag.hex(),
        )

    async def _attempt(
        self, instance: int, image: MissingItem, request: EncodeRequest, give_up_at: float, left: int
    ) -> Lease:
        now = asyncio.get_running_loop().time()
        seconds = (give_up_at - now) / left
        try:
            async with asyncio.timeout(seconds):
                with self._metrics.encode_call.time():
                    ready = await self._encoders.encode(instance, request)
                return await self._receiver.receive(image, request, ready)
        except TimeoutError:
            raise EncodeTimeoutError(
                f"an encode worker brought no embedding within {seconds:.3g} seconds; retry later"
            ) from None


def _was_wrong(failure: MmCacheError | None) -> bool:
    """Whether the embedding itself was wrong, and may lie so in the arena of whoever is asked next."""
    return isinstance(failure, (ChecksumMismatchError, EmbeddingMismatchError))


def _another_attempt_helps(error: MmCacheError, *, alone: bool) -> bool:
    """Whether to ask again: another instance, or where there is `alone` one, that one for other bytes."""
    return isinstance(error, TransferError if alone else (EncodeError, TransferError))


def _unavailable(ranked: list[int]) -> EncodeUnavailableError:
    reason = (
        "every encode worker has failed repeatedly and is being left alone"
        if ranked
        else "no encode worker is alive, so new images cannot be encoded"
    )
    return EncodeUnavailableError(f"{reason}; text and cached images are still served; retry later")
