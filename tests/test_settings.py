"""Settings: engine configuration files load and a mistake in one is named; what is derived from settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from trtllm_mm_cache.engines.engine_args import load_engine_args
from trtllm_mm_cache.engines.foreign_tower import ForeignTowerArgs
from trtllm_mm_cache.engines.sglang.settings import SglangEngineArgs
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs
from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.settings import EncodeSettings, PdSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.glob("**/*.yaml"))
ENGINES = {"vllm": VllmEngineArgs, "sglang": SglangEngineArgs}
"""Engines with a folder of their own below the model's; the encode workers' files are of transformers."""
HALVES = ("encode.yaml", "pd.yaml")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def schema_of(path: Path) -> type[BaseModel]:
    """An engine with a folder in the model's: its encode workers run transformers."""
    if path.parent.name in ENGINES:
        return TransformersEngineArgs if path.name == "encode.yaml" else ENGINES[path.parent.name]
    if path.parent.name == "cpu-demo":
        return TransformersEngineArgs
    return TrtllmEncoderArgs if path.name == "encode.yaml" else TrtllmLlmArgs


def test_each_model_has_a_folder_with_both_files() -> None:
    folders = {name_of(path.parent): {file.name for file in path.parent.iterdir()} for path in FILES}
    assert {
        "cpu-demo",
        "cpu-demo/vllm",
        "internvl3-8b-hf/vllm",
        "qwen2-vl-7b-instruct/vllm",
        "llava-v1.6-mistral-7b-hf",
        "llava-v1.6-mistral-7b-hf/vllm",
        "qwen2.5-vl-7b-instruct",
        "qwen2.5-vl-7b-instruct/vllm",
        "qwen3-vl-2b-instruct",
        "qwen3-vl-2b-instruct/vllm",
        "qwen3-vl-30b-a3b-instruct-fp8",
    } <= folders.keys()
    assert all({"encode.yaml", "pd.yaml"} <= files for files in folders.values())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_loads_and_every_key_arrives(path: Path) -> None:
    args = load_engine_args(path, schema_of(path))
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "# "]
    assert {line.partition(":")[0] for line in lines} == args.model_fields_set


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_key_is_explained(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.strip() and line.lstrip()[0] != "#"]
    for line in lines:
        opens_a_part = line.endswith(":")
        assert opens_a_part or len(line.partition("# ")[2]) > 10, f"{path.name}: {line}"


@pytest.mark.parametrize("folder", [path.parent for path in FILES if path.name == "pd.yaml"], ids=name_of)
def test_both_halves_of_a_model_agree_on_what_enters_the_keys(folder: Path) -> None:
    halves = [load_engine_args(folder / file, schema_of(folder / file)) for file in HALVES]
    encode, pd = (half.model_dump() for half in halves)
    if isinstance(halves[1], ForeignTowerArgs):
        wanted = (pd["encoder_dtype"], pd["dtype"], pd["encoder_image_processor"])
        assert (encode["dtype"], encode["embedding_dtype"], encode["image_processor"]) == wanted
    else:
        assert encode["dtype"] == pd["dtype"]


@pytest.mark.parametrize("schema", [TrtllmEncoderArgs, TrtllmLlmArgs])
@pytest.mark.parametrize("setting", sorted({*EncodeSettings.model_fields, *PdSettings.model_fields}))
def test_no_setting_of_ours_reaches_the_engine(schema: type[BaseModel], setting: str) -> None:
    """What TensorRT-LLM does not know it refuses, after minutes of loading; here it is refused at once."""
    with pytest.raises(ValidationError, match=setting):
        schema.model_validate({setting: 1})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_unknown_key_names_file_and_key(path: Path, tmp_path: Path) -> None:
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text() + "\nno_such_key: 1\n")
    with pytest.raises(ConfigurationError) as caught:
        load_engine_args(wrong, schema_of(path))
    assert str(wrong) in str(caught.value)
    assert "'no_such_key'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("torch_threads: many", "'torch_threads'"),
        ("torch_threads: 1\ntorch_threads: 2", "'torch_threads' stands twice"),
        ("- torch_threads", "must hold `key: value` lines, not a list"),
        ("torch_threads: [1", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "pd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_engine_args(path, TransformersEngineArgs)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_which_flag_named_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--extra-engine-args"):
        load_engine_args(tmp_path / "none.yaml", TransformersEngineArgs)


def test_only_given_keys_reach_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "pd.yaml"
    path.write_text("max_batch_size: 4\nkv_cache_config:\n  enable_block_reuse: false\n")
    given = load_engine_args(path, TrtllmLlmArgs).given()
    assert given == {"max_batch_size": 4, "kv_cache_config": {"enable_block_reuse": False}}


def test_the_served_name_defaults_to_the_models() -> None:
    assert PdSettings(model_path="org/some-model").model_name == "some-model"
    assert PdSettings(model_path="org/some-model", served_model_name="shown").model_name == "shown"
