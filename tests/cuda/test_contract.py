"""On a GPU a hit is a miss, to the bit, and both are the model's own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.contract import assert_bit_equal, assert_clearly_different, chat_case, picture, pictures
from trtllm_mm_cache.cache.manager import Lease, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import (
    TransformersEngineArgs,
    TransformersGenerator,
    TransformersVisionEncoder,
)

ARGS = TransformersEngineArgs(device="cuda", dtype="bfloat16")


@pytest.fixture
def encoder(model_dir: Path) -> Iterator[TransformersVisionEncoder]:
    loaded = TransformersVisionEncoder(model_dir, ARGS)
    yield loaded
    loaded.close()


@pytest.fixture
def generator(model_dir: Path) -> Iterator[TransformersGenerator]:
    loaded = TransformersGenerator(model_dir, ARGS)
    yield loaded
    asyncio.run(loaded.close())


def stored(cache: MultimodalEmbeddingCacheManager, key: str, encoded: object) -> Lease:
    assert isinstance(encoded, EncodedItem), encoded
    assert encoded.tensor.is_cuda
    assert encoded.tensor.dtype == torch.bfloat16
    reservation = cache.reserve(key, encoded.tensor.nbytes, owner="test")
    reservation.write(encoded.tensor, computed=True)
    shape = tuple(encoded.tensor.shape)
    return reservation.commit(dtype=encoded.tensor.dtype, shape=shape, metadata=encoded.metadata)


@pytest.mark.parametrize("count", [1, 3])
def test_a_hit_is_the_miss_to_the_bit(
    count: int,
    model_dir: Path,
    encoder: TransformersVisionEncoder,
    generator: TransformersGenerator,
    manager: MultimodalEmbeddingCacheManager,
) -> None:
    case = chat_case(model_dir, pictures(count))
    prepared = [encoder.preprocess(item) for item in case.items(generator.variant(count))]
    encoded = [encoder.encode([one])[0] for one in prepared]
    leases = [stored(manager, str(index), one) for index, one in enumerate(encoded)]
    miss = generator.prefill_logits(case.request, leases)
    hits = [manager.lease(lease.key) for lease in leases]
    assert_bit_equal(generator.prefill_logits(case.request, [hit for hit in hits if hit]), miss)
    other = encoder.encode(
        [encoder.preprocess(EncodeItem(picture(9, 64, 96), variant=generator.variant(count)))]
    )
    if count == 1:
        wrong = stored(manager, "other", other[0])
        if wrong.shape == leases[0].shape:
            assert_clearly_different(generator.prefill_logits(case.request, [wrong]), miss)
        wrong.release()
    for lease in (*leases, *hits):
        if lease is not None:
            lease.release()


def test_a_batch_of_images_of_several_sizes_is_what_each_is_alone(
    model_dir: Path, encoder: TransformersVisionEncoder, generator: TransformersGenerator
) -> None:
    items = [EncodeItem(image, variant=generator.variant(3)) for image in pictures(3)]
    prepared = [encoder.preprocess(item) for item in items]
    for together, one in zip(encoder.encode(prepared), prepared, strict=True):
        (alone,) = encoder.encode([one])
        assert isinstance(together, EncodedItem)
        assert isinstance(alone, EncodedItem)
        scale = alone.tensor.float().std()
        assert ((together.tensor.float() - alone.tensor.float()).abs().max() / scale).item() < 0.2
