"""What `plan` says of an embedding's size, against embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libcachesim
import pytest
from click.testing import CliRunner

from tests.cache.traces import zipf
from tests.engines.conftest import Halves, ModelFactory
from tests.engines.contract import picture
from trtllm_mm_cache.cache.manager import CachedEmbedding, MultimodalEmbeddingCacheManager
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.cli.plan import lru_entries, lru_hit_ratio, make_plan
from trtllm_mm_cache.engines.base import EncodeItem
from trtllm_mm_cache.engines.transformers import embedding_shape
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import GB, PlanSettings

SIZES = [(120, 80), (61, 149), (33, 400)]


def test_the_shape_is_that_of_the_embedding(halves: Halves) -> None:
    for images_in_prompt in (1, 2):
        variant = halves.generator.variant(images_in_prompt)
        for width, height in SIZES:
            embedding = halves.encode(EncodeItem(picture(1, width, height), {}, variant)).tensor
            shape = embedding_shape(
                halves.model_dir, (width, height), {}, images_in_prompt=images_in_prompt, dtype="float32"
            )
            assert (shape.rows, shape.width) == tuple(embedding.shape)
            assert shape.nbytes == embedding.nbytes


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("qwen2_5_vl", {"max_pixels": 4000}),
        ("internvl", {"crop_to_patches": True, "max_patches": 2}),
        ("smolvlm", {"do_image_splitting": False}),
    ],
)
def test_processor_kwargs_count(
    architecture: str, kwargs: dict[str, Any], halves_of: Callable[[str], Halves]
) -> None:
    halves = halves_of(architecture)
    embedding = halves.encode(EncodeItem(picture(1, 300, 200), kwargs)).tensor
    shape = embedding_shape(halves.model_dir, (300, 200), kwargs, images_in_prompt=1, dtype="float32")
    plain = embedding_shape(halves.model_dir, (300, 200), {}, images_in_prompt=1, dtype="float32")
    assert shape.nbytes == embedding.nbytes
    assert shape.rows != plain.rows


def without_weights(model: Path, target: Path, **changes: Any) -> Path:
    """Copy a model's configuration and tokenizer; `changes` go into its text configuration."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_plan_needs_no_weights_and_its_cache_holds_the_working_set(
    model_of: ModelFactory, halves_of: Callable[[str], Halves], tmp_path: Path
) -> None:
    model = without_weights(model_of("qwen2_vl"), tmp_path / "model")
    settings = PlanSettings(model_path=model, images=40, size="120x80")
    plan = make_plan(settings)
    embedding = halves_of("qwen2_vl").encode(EncodeItem(picture(1, 120, 80))).tensor
    manager = MultimodalEmbeddingCacheManager(int(plan.capacity_gb * GB))
    for number in range(settings.images):
        assert manager.set(str(number), CachedEmbedding(embedding))
    assert manager.stats["evictions"] == 0
    assert manager.stats["current_bytes"] == 40 * plan.shape.nbytes
    manager.close()


def test_the_dtype_is_the_engines(model_of: ModelFactory, tmp_path: Path) -> None:
    args = tmp_path / "encode.yaml"
    args.write_text("embedding_dtype: bfloat16\n")
    model = without_weights(model_of("qwen2_5_vl"), tmp_path / "model", dtype="bfloat16")
    full = make_plan(PlanSettings(model_path=model, images=1, size="120x80"))
    stored = make_plan(PlanSettings(model_path=model, images=1, size="120x80", extra_engine_args=args))
    trtllm = make_plan(PlanSettings(model_path=model, images=1, size="120x80", engine="trtllm"))
    assert full.shape.nbytes == 2 * stored.shape.nbytes == 2 * trtllm.shape.nbytes


def test_the_mixture_of_experts_is_sized_as_the_dense_model(model_of: ModelFactory, tmp_path: Path) -> None:
    dense = without_weights(model_of("qwen3_vl"), tmp_path / "dense", dtype="bfloat16")
    experts = without_weights(model_of("qwen3_vl"), tmp_path / "experts", dtype="bfloat16")
    config = (experts / "config.json").read_text().replace("qwen3_vl", "qwen3_vl_moe")
    (experts / "config.json").write_text(config)
    plans = [
        make_plan(PlanSettings(model_path=model, images=1, size="90x120", engine="trtllm"))
        for model in (dense, experts)
    ]
    assert plans[0].shape == plans[1].shape


def test_the_command_says_the_flag(model_of: ModelFactory) -> None:
    arguments = ["--model-path", str(model_of("qwen2_vl")), "--images", "1000", "--size", "1024x768"]
    done = CliRunner().invoke(cli, ["plan", *arguments])
    assert done.exit_code == 0, done.output
    plan = make_plan(PlanSettings(model_path=model_of("qwen2_vl"), images=1000, size="1024x768"))
    assert f"--multimodal-embedding-cache-capacity-gb {plan.capacity_gb:g}\n" in done.output
    assert f"{plan.shape.nbytes:,} bytes" in done.output
    fewer = CliRunner().invoke(cli, ["plan", *arguments, "--hit", "0.5"])
    assert "hits 50 % of lookups" in fewer.output


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_path": Path("/none")}, "not a directory"),
        ({"size": "99999x99999"}, "megapixels"),
        ({"processor_kwargs": "{"}, "not JSON"),
        ({"processor_kwargs": "[1]"}, "must be a JSON object"),
        ({"processor_kwargs": '{"colour": 1}'}, "colour"),
        ({"processor_kwargs": '{"max_pixels": 1}', "engine": "trtllm"}, "model's own settings hold"),
        ({"size": "1x4000"}, "cannot take this image"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], says: str, model_of: ModelFactory) -> None:
    settings = PlanSettings.model_validate(
        {"model_path": model_of("qwen2_vl"), "images": 1, "size": "64x64", **changes}
    )
    with pytest.raises(ConfigurationError, match=says):
        make_plan(settings)


@pytest.mark.parametrize("hit_ratio", [0.3, 0.6])
def test_entries_for_a_hit_ratio_are_those_of_an_lru_cache(hit_ratio: float) -> None:
    """The trace asks for 4,000 objects by Zipf's law with exponent 0.9."""
    trace = zipf(seed=11, length=40_000)
    cache, request = libcachesim.LRU(lru_entries(4000, 0.9, hit_ratio)), libcachesim.Request()
    request.obj_size, hits = 1, []
    for request.obj_id, _ in trace:
        hits.append(cache.get(request))
    warm = hits[10_000:]
    assert sum(warm) / len(warm) == pytest.approx(hit_ratio, abs=0.015)


@pytest.mark.parametrize("entries", [10, 300, 2000])
def test_the_hit_ratio_of_entries_is_the_other_way_round(entries: int) -> None:
    hit_ratio = lru_hit_ratio(5000, 0.9, entries)
    assert abs(lru_entries(5000, 0.9, hit_ratio) - entries) <= 1
    assert lru_hit_ratio(5000, 0.9, 5000) == 1.0


def test_a_disk_is_said_to_bring_what_memory_misses(model_of: ModelFactory) -> None:
    common = {"model_path": model_of("llava"), "size": "32x32", "images": 100_000, "hit": 0.5}
    small, large = (make_plan(PlanSettings(disk_gb=gb, **common)) for gb in (0.5, 1024))
    assert small.disk_entries == int(0.5 * GB) // (4096 + -(-small.shape.nbytes // 4096) * 4096)
    assert "50.0 % miss the memory" in small.text()
    assert "--multimodal-embedding-cache-disk-capacity-gb 0.5" in small.text()
    assert "holds 100,000 of 100,000 images" in large.text()
    assert "0.0 % are encoded" in large.text()
