"""The encode side: embeddings image by image, whatever shares the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import skimage
import torch
from PIL import Image

from tests.engines.conftest import Halves, ModelFactory
from tests.engines.contract import (
    assert_bit_equal,
    assert_clearly_different,
    assert_logits_are_the_models_own,
    assert_same_up_to_rounding,
    chat_case,
    picture,
    pictures,
    reference_model,
    reference_processor,
)
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.transformers import (
    TransformersEngineArgs,
    TransformersGenerator,
    TransformersVisionEncoder,
)
from trtllm_mm_cache.errors import (
    EmbeddingMismatchError,
    EncodeFailedError,
    InvalidImageError,
    InvalidRequestError,
)


def encoded(results: list[Any]) -> list[EncodedItem]:
    """Return the results, all of which must be embeddings."""
    assert all(isinstance(result, EncodedItem) for result in results), results
    return results


def test_a_mixed_batch_gives_what_each_image_gives_alone(
    halves: Halves, caplog: pytest.LogCaptureFixture
) -> None:
    images = [*pictures(3), picture(7, 120, 80), picture(8, 60, 150)]
    for variant in sorted({halves.generator.variant(1), halves.generator.variant(2)}):
        items = [EncodeItem(image, variant=variant) for image in images]
        batch = encoded(halves.encoder.encode([halves.encoder.preprocess(item) for item in items]))
        for result, item in zip(batch, items, strict=True):
            alone = halves.encode(item)
            assert_same_up_to_rounding(result.tensor, alone.tensor)
            assert result.metadata == alone.metadata
    assert not caplog.records, "images of different shapes were tried together and failed"


def test_embeddings_are_contiguous_and_apart(halves: Halves) -> None:
    items = [EncodeItem(picture(seed, 120, 80), variant=halves.generator.variant(1)) for seed in (1, 2)]
    first, second = encoded(halves.encoder.encode([halves.encoder.preprocess(item) for item in items]))
    token_id = reference_model(halves.model_dir).config.image_token_id
    token = reference_processor(halves.model_dir).tokenizer.convert_ids_to_tokens(token_id)
    for result in (first, second):
        assert result.tensor.is_contiguous()
        assert result.tensor.shape[0] == str(result.metadata.placeholder).count(token) > 0
    before = second.tensor.clone()
    first.tensor.zero_()
    assert torch.equal(second.tensor, before)


def test_one_failing_image_spoils_no_other(halves: Halves) -> None:
    item = EncodeItem(picture(1, 120, 80), variant=halves.generator.variant(1))
    good = halves.encoder.preprocess(item)
    wrong_rows = replace(good, rows=good.rows + 1)
    name = "pixel_values"
    wrong_shape = replace(good, inputs={**good.inputs, name: good.inputs[name][..., :-1]})
    results = halves.encoder.encode([good, wrong_rows, wrong_shape, good])
    assert [type(result) for result in results] == [
        EncodedItem,
        EncodeFailedError,
        EncodeFailedError,
        EncodedItem,
    ]
    assert_same_up_to_rounding(results[3].tensor, halves.encode(item).tensor)


def test_preprocessing_in_threads_gives_what_it_gives_alone(halves: Halves) -> None:
    items = [EncodeItem(picture(seed, 60 + 20 * seed, 90)) for seed in range(8)]
    alone = [halves.encoder.preprocess(item) for item in items]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(halves.encoder.preprocess, items))
    for one, other in zip(alone, together, strict=True):
        assert one.placeholder == other.placeholder
        assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_image_mode_is_taken(halves: Halves, mode: str) -> None:
    image = picture(1, 120, 80).convert(mode)
    variant = halves.generator.variant(1)
    result = halves.encode(EncodeItem(image, variant=variant))
    as_rgb = halves.encode(EncodeItem(image.convert("RGB"), variant=variant))
    assert_bit_equal(result.tensor, as_rgb.tensor)


def test_grey_images_are_taken_where_the_configuration_leaves_them_open(
    model_of: ModelFactory, tmp_path: Path
) -> None:
    model_dir = Path(shutil.copytree(model_of("llava"), tmp_path / "copy"))
    path = model_dir / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_convert_rgb": False}))
    encoder = TransformersVisionEncoder(model_dir, TransformersEngineArgs(device="cpu"))
    grey = picture(1, 120, 80).convert("L")
    first, second = encoded(
        encoder.encode([encoder.preprocess(EncodeItem(image)) for image in (grey, grey.convert("RGB"))])
    )
    assert_same_up_to_rounding(first.tensor, second.tensor)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize(
    "name", ["astronaut.png", "camera.png", "logo.png", "microaneurysms.png", "page.png"]
)
def test_real_pictures(halves_of: Callable[[str], Halves], architecture: str, name: str) -> None:
    """Photographs, a scan and a drawing; colour, grey and transparent; large and small."""
    halves = halves_of(architecture)
    image = Image.open(Path(skimage.__file__).parent / "data" / name)
    case = chat_case(halves.model_dir, [image.convert("RGB")])
    assert_logits_are_the_models_own(halves.generator, case, halves.carry(case.items("")))
    assert halves.encode(EncodeItem(image)).metadata == halves.encode(case.items("")[0]).metadata


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 500), (500, 3)])
def test_tiny_and_narrow_pictures_are_encoded(halves: Halves, size: tuple[int, int]) -> None:
    case = chat_case(halves.model_dir, [Image.new("RGB", size, "red")])
    leases = halves.carry(case.items(halves.generator.variant(1)))
    assert_logits_are_the_models_own(halves.generator, case, leases)


def test_a_picture_that_the_processor_refuses(halves_of: Callable[[str], Halves]) -> None:
    with pytest.raises(InvalidImageError, match="aspect ratio"):
        halves_of("qwen2_vl").encoder.preprocess(EncodeItem(Image.new("RGB", (2000, 1))))


def test_several_images_are_encoded_otherwise_by_llava_onevision(
    halves_of: Callable[[str], Halves], halves: Halves
) -> None:
    onevision = halves_of("llava_onevision")
    alone, among_others = (onevision.generator.variant(count) for count in (1, 2))
    assert onevision.generator.variant(3) == among_others != alone
    image = picture(1, 120, 80)
    tiled, padded = (onevision.encode(EncodeItem(image, variant=v)) for v in (alone, among_others))
    assert tiled.tensor.shape[0] > padded.tensor.shape[0]
    if halves is not onevision:
        assert {halves.generator.variant(count) for count in range(4)} == {""}


@pytest.mark.parametrize(
    ("architecture", "kwargs", "field"),
    [
        ("qwen2_vl", {"nonsense": 1}, "nonsense"),
        ("qwen2_vl", {"patch_size": 7}, "patch_size"),
        ("qwen2_vl", {"do_pan_and_scan": True}, "do_pan_and_scan"),
        ("qwen2_vl", {"max_pixels": "9"}, "max_pixels"),
        ("qwen2_vl", {"max_pixels": True}, "max_pixels"),
        ("qwen2_vl", {"max_pixels": 0}, "max_pixels"),
        ("qwen2_vl", {"max_pixels": 10**9}, "longest_edge"),
        ("qwen2_vl", {"min_pixels": 10**9}, "shortest_edge"),
        ("qwen2_vl", {"min_pixels": 5000, "max_pixels": 4000}, "smallest size"),
        ("qwen2_vl", {"size": {"width": 9}}, "size"),
        ("qwen2_vl", {"size": 7}, "size"),
        ("llava", {"size": {"shortest_edge": 7}}, "size"),
        ("smolvlm", {"size": {"longest_edge": 10**6}}, "longest_edge"),
        ("smolvlm", {"size": {"shortest_edge": 10}}, "shortest_edge"),
        ("internvl", {"max_patches": 7}, "max_patches"),
        ("internvl", {"min_patches": 7}, "min_patches"),
        ("internvl", {"crop_to_patches": 1}, "crop_to_patches"),
        ("gemma3", {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 5}, "pan_and_scan_max_num_crops"),
        ("gemma3", {"pan_and_scan_min_ratio_to_activate": float("nan")}, "min_ratio"),
    ],
)
def test_wrong_processor_kwargs_are_named(
    halves_of: Callable[[str], Halves], architecture: str, kwargs: dict[str, Any], field: str
) -> None:
    item = EncodeItem(picture(1, 120, 80), kwargs)
    with pytest.raises(InvalidRequestError, match=rf"mm_processor_kwargs.*{field}"):
        halves_of(architecture).encoder.preprocess(item)


def test_pixel_limits_by_their_older_names(halves_of: Callable[[str], Halves]) -> None:
    halves, image = halves_of("qwen2_vl"), picture(1, 120, 80)
    limit = 28 * 28 * 4
    by_name = halves.encode(EncodeItem(image, {"max_pixels": limit}))
    by_edge = halves.encode(EncodeItem(image, {"size": {"longest_edge": limit}}))
    assert by_name.tensor.shape[0] <= 4 < halves.encode(EncodeItem(image)).tensor.shape[0]
    assert_bit_equal(by_name.tensor, by_edge.tensor)


async def test_a_half_stored_dtype_rounds_the_features_only(model_of: ModelFactory, halves_of: Any) -> None:
    exact = halves_of("qwen3_vl")
    args = TransformersEngineArgs(device="cpu", embedding_dtype="bfloat16")
    encoder = TransformersVisionEncoder(exact.model_dir, args)
    generator = TransformersGenerator(exact.model_dir, args)
    assert encoder.fingerprint == generator.fingerprint != exact.encoder.fingerprint
    half = replace(exact, encoder=encoder, generator=generator)
    case = chat_case(exact.model_dir, pictures(1))
    item = case.items("")[0]
    assert_bit_equal(half.encode(item).tensor, exact.encode(item).tensor.to(torch.bfloat16))
    lease, exact_lease = half.carry([item])[0], exact.carry([item])[0]
    rounded = generator.prefill_logits(case.request, [lease])
    expected = exact.generator.prefill_logits(case.request, [exact_lease])
    assert 0 < (rounded - expected).abs().max() < 0.2 * expected.std()
    with pytest.raises(EmbeddingMismatchError, match="bfloat16"):
        exact.generator.prefill_logits(case.request, [lease])
    await generator.close()


def test_images_differ_in_their_embeddings(halves: Halves) -> None:
    variant = halves.generator.variant(1)
    first, second = (halves.encode(EncodeItem(picture(seed, 120, 80), variant=variant)) for seed in (1, 5))
    assert_clearly_different(first.tensor, second.tensor)
