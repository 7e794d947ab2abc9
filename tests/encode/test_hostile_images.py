"""Hostile images at a whole encode worker: each is refused alone, and nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.encode.bench import Bench, running
from tests.media import images
from tests.media.conftest import check_politeness
from tests.media.images import LIMITS, noise, saved
from trtllm_mm_cache.engines.base import EncodeItem
from trtllm_mm_cache.engines.transformers import TransformersVisionEncoder
from trtllm_mm_cache.errors import (
    EncodeFailedError,
    InvalidImageError,
    MediaTooLargeError,
    MmCacheError,
    ProtocolMismatchError,
    UnsupportedMediaError,
)
from trtllm_mm_cache.media import decode_image
from trtllm_mm_cache.runtime.messages import EncodeReady
from trtllm_mm_cache.settings import ImageLimits

load_image = pytest.importorskip("transformers.image_utils").load_image


@pytest.fixture
async def bench(encoder: TransformersVisionEncoder) -> AsyncIterator[Bench]:
    async with running(encoder, capacity_bytes=4 * 1024**2, max_batch_images=64) as started:
        yield started


HOSTILE: dict[str, tuple[bytes, type[MmCacheError]]] = {
    "empty": (b"", InvalidImageError),
    "truncated": (saved(noise(), "JPEG")[:300], InvalidImageError),
    "bomb, png": (images.png_bomb(30_000, 30_000), MediaTooLargeError),
    "bomb, jpeg": (images.jpeg_of_size(65_500, 65_500), MediaTooLargeError),
    "bomb, webp": (images.webp_canvas(1 << 24, 1 << 24), MediaTooLargeError),
    "bomb, gif": (images.gif_of_size(65_535, 65_535), MediaTooLargeError),
    "bomb, tiff": (images.tiff_of_size(40_000, 40_000), MediaTooLargeError),
    "strip": (saved(Image.new("L", (1, 60_000)), "PNG"), MediaTooLargeError),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UnsupportedMediaError),
    "scans": (images.jpeg_of_scans(1000), InvalidImageError),
}


async def test_hostile_images_spoil_no_other_of_their_micro_batch(
    bench: Bench, encoder: TransformersVisionEncoder
) -> None:
    honest = [saved(noise(seed=seed), "PNG") for seed in range(6)]
    files = [
        media
        for pair in zip(honest, [hostile for hostile, _ in HOSTILE.values()], strict=False)
        for media in pair
    ]
    files += [hostile for hostile, _ in list(HOSTILE.values())[len(honest) :]]
    results = await asyncio.gather(*(bench.call(media) for media in files), return_exceptions=True)
    outcomes = dict(zip(files, results, strict=True))
    for media, kind in HOSTILE.values():
        refusal = outcomes[media]
        assert isinstance(refusal, MmCacheError)
        assert type(refusal) is kind
        check_politeness(refusal)
    for media in honest:
        ready = outcomes[media]
        assert isinstance(ready, EncodeReady)
        image = decode_image(media, LIMITS)
        (alone,) = encoder.encode([encoder.preprocess(EncodeItem(image))])
        assert not isinstance(alone, MmCacheError)
        torch.testing.assert_close(bench.embedding(ready), alone.tensor, rtol=1e-4, atol=1e-5)
    assert len(bench.manager.keys()) == len(honest), "nothing hostile is kept"
    assert bench.pipeline.maker.batcher.items == len(honest)


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_an_oriented_photograph_is_encoded_as_the_models_own_loader_turns_it(
    bench: Bench, encoder: TransformersVisionEncoder, orientation: int, tmp_path: Path
) -> None:
    photograph = saved(noise(size=(48, 24), seed=orientation), "JPEG", exif=images.exif(orientation))
    (tmp_path / "photograph.jpg").write_bytes(photograph)
    expected = encoder.encode([encoder.preprocess(EncodeItem(load_image(str(tmp_path / "photograph.jpg"))))])
    first, again = [await bench.call(photograph) for _ in range(2)]
    assert (first.origin, again.origin) == ("encoded", "cached")
    assert not isinstance(expected[0], MmCacheError)
    assert torch.equal(bench.embedding(first), expected[0].tensor)
    assert torch.equal(bench.embedding(again), expected[0].tensor)


async def test_the_limits_are_this_workers_own_whatever_the_pd_worker_let_pass(
    encoder: TransformersVisionEncoder,
) -> None:
    media = saved(noise(size=(64, 64)), "PNG")
    limits: list[tuple[ImageLimits, type[MmCacheError]]] = [
        (ImageLimits(max_file_size_mb=0.001), MediaTooLargeError),
        (ImageLimits(max_image_megapixels=0.001), MediaTooLargeError),
        (ImageLimits(max_side=32), MediaTooLargeError),
        (ImageLimits(formats=frozenset({"JPEG"})), UnsupportedMediaError),
    ]
    for limit, kind in limits:
        async with running(encoder, images=limit) as bench:
            with pytest.raises(kind):
                await bench.call(media)


async def test_another_background_is_another_model_to_both_sides(
    encoder: TransformersVisionEncoder,
) -> None:
    media = saved(noise("RGBA"), "PNG")
    async with running(encoder) as white:
        asked = white.request(media).model_dump()
        shown = white.embedding(await white.call(media))
    async with running(encoder, images=ImageLimits(transparent_background="000000")) as black:
        with pytest.raises(ProtocolMismatchError, match="--transparent-background"):
            await black.send(asked)
        assert not torch.equal(black.embedding(await black.call(media)), shown)
        assert black.key(media) != asked["key"]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"fingerprint": "cd" * 32},
        {"key": "../../etc/passwd"},
        {"media": "file:///etc/passwd"},
        {"media": {"path": "/etc/passwd"}},
        {"path": "/etc/passwd"},
        {"processor_kwargs": {"a": "x" * 100_000}},
        {"variant": "x" * 1000},
    ],
)
async def test_only_the_protocol_is_answered(bench: Bench, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolMismatchError) as caught:
        await bench.send(bench.request(saved(noise(), "PNG")).model_dump() | changes)
    assert "passwd" not in str(caught.value)
    assert bench.manager.keys() == []


async def test_a_pickle_is_bytes_that_are_no_image(bench: Bench, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickled = b"cpathlib\nPath\n(V" + str(trap).encode() + b"\ntR."
    with pytest.raises(UnsupportedMediaError):
        await bench.call(pickled)
    for payload in (pickled, [pickled], None, "text", 5):
        with pytest.raises(ProtocolMismatchError):
            await bench.send(payload)
    assert not trap.exists()


async def test_what_a_processor_cannot_take_is_that_images_failure(
    bench: Bench, encoder: TransformersVisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an exception of the handler's, which would speak against the worker."""

    def fail(item: EncodeItem) -> Any:
        raise RuntimeError("cannot reshape at /secret/path.py")

    monkeypatch.setattr(encoder, "preprocess", fail)
    with pytest.raises(EncodeFailedError) as caught:
        await bench.call(saved(noise(), "PNG"))
    assert "secret" not in str(caught.value)
