"""The encode side over the peer: real features, opened from the other process and freed there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engines.conftest import Halves
from tests.engines.contract import assert_bit_equal, picture, pictures
from tests.engines.trtllm.conftest import TrtllmHalves
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.trtllm import TrtllmEncoderArgs, TrtllmVisionEncoder
from trtllm_mm_cache.errors import ConfigurationError, EncodeFailedError, InvalidRequestError


def test_features_and_grids_are_the_models_own(
    trtllm: TrtllmHalves, halves_of: Callable[[str], Halves]
) -> None:
    other = halves_of(trtllm.model_dir.name)
    for image in pictures(3):
        encoded, expected = trtllm.encode(image), other.encode(EncodeItem(image))
        assert_bit_equal(encoded.tensor, expected.tensor)
        assert encoded.metadata.grid_thw == expected.metadata.grid_thw


def test_a_batch_gives_each_image_its_own_result(trtllm: TrtllmHalves) -> None:
    images = pictures(3)
    batch = trtllm.encoder.encode([trtllm.encoder.preprocess(EncodeItem(image)) for image in images])
    assert len(batch) == 3
    for result, image in zip(batch, images, strict=True):
        assert isinstance(result, EncodedItem)
        torch.testing.assert_close(result.tensor, trtllm.encode(image).tensor)


def test_both_halves_report_one_fingerprint_that_others_do_not_have(
    trtllm: TrtllmHalves, halves_of: Callable[[str], Halves]
) -> None:
    assert trtllm.encoder.fingerprint == trtllm.generator.fingerprint
    assert trtllm.encoder.fingerprint != halves_of(trtllm.model_dir.name).encoder.fingerprint


def test_a_view_that_is_dropped_is_freed_by_the_engine(qwen: TrtllmHalves) -> None:
    vision, _ = qwen.executor_pids
    held = qwen.encode(picture(21, 64, 64))
    for seed in range(22, 32):
        qwen.encode(picture(seed, 64, 64))
    files = list(Path("/dev/shm").glob(f"torch_{vision}_*"))  # noqa: S108 - where torch keeps them
    # One embedding and two tensors of positions each: those held, and the last, not yet swept.
    assert 0 < len(files) <= 2 * 3
    assert torch.isfinite(held.tensor).all()


def test_images_that_are_not_rgb_are_converted(qwen: TrtllmHalves) -> None:
    grey = picture(3, 64, 64).convert("L")
    assert_bit_equal(qwen.encode(grey).tensor, qwen.encode(grey.convert("RGB")).tensor)


def test_processor_kwargs_are_refused_by_name(qwen: TrtllmHalves) -> None:
    with pytest.raises(InvalidRequestError, match=r"mm_processor_kwargs\.max_pixels cannot be set"):
        qwen.encoder.preprocess(EncodeItem(picture(1, 64, 64), {"max_pixels": 100}))


def test_an_image_the_engine_cannot_encode_spoils_no_other(
    qwen: TrtllmHalves, caplog: pytest.LogCaptureFixture
) -> None:
    good, thin = picture(1, 64, 64), picture(1, 2000, 4)  # an aspect ratio that the processor refuses
    first, second = qwen.encoder.encode([good, thin])
    assert isinstance(first, EncodedItem)
    assert isinstance(second, EncodeFailedError)
    assert "the vision tower failed on a batch of 2 images" in caplog.text


def test_a_tower_in_the_workers_own_process_is_refused(
    qwen: TrtllmHalves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    with pytest.raises(ConfigurationError, match="unset it"):
        TrtllmVisionEncoder(qwen.model_dir, TrtllmEncoderArgs())
