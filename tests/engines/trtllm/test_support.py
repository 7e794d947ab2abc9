"""Which models and releases are served, and what the others are told."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import ModelFactory
from tests.engines.contract import ARCHITECTURES
from trtllm_mm_cache.engines.trtllm import TrtllmGenerator, TrtllmLlmArgs, load_generator, load_vision_encoder
from trtllm_mm_cache.engines.trtllm.support import architecture_of, import_tensorrt_llm, is_known_release
from trtllm_mm_cache.errors import ConfigurationError

SERVED = {"llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}


def model_with(folder: Path, model_type: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.mark.parametrize("model_type", sorted(SERVED))
def test_models_that_are_served(model_type: str, tmp_path: Path) -> None:
    assert architecture_of(model_with(tmp_path, model_type)).model_type == model_type


@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, "llama4", "no_such_model"} - SERVED))
@pytest.mark.parametrize("load", [load_generator, load_vision_encoder])
def test_others_are_refused_at_start_with_the_reason(model_type: str, load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TensorRT-LLM") as caught:
        load(model_with(tmp_path, model_type), None)
    text = str(caught.value)
    assert repr(model_type) in text
    assert all(name in text for name in SERVED)
    if model_type == "qwen2_vl":
        assert "Qwen2.5-VL and Qwen3-VL, not for Qwen2-VL" in text


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json with a model_type"):
        architecture_of(tmp_path)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("1.3.0rc21", True),
        ("1.3.0rc29", True),
        ("1.3.0", True),
        ("1.3.2", True),
        ("1.3.0rc20", False),
        ("1.2.1", False),
        ("1.4.0rc1", False),
        ("2.0", False),
        ("nightly", False),
    ],
)
def test_the_releases_it_was_written_for(version: str, known: bool) -> None:
    assert is_known_release(version) is known


def test_another_release_is_warned_of_once_with_both_versions(
    peer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import_tensorrt_llm()
    assert not caplog.records
    monkeypatch.setattr(peer, "__version__", "1.1.0")
    import_tensorrt_llm()
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1.1.0" in record.getMessage()
    assert "1.3.0rc21" in record.getMessage()


def test_without_the_package_the_way_out_is_named(
    model_of: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'trtllm-mm-cache\[trtllm\]'"):
        TrtllmGenerator(model_of("qwen3_vl"), TrtllmLlmArgs())


def test_a_release_that_takes_no_handles_for_the_model_is_refused_and_ends(
    peer: Any, model_of: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the attach path would be left, which gives the KV cache no hash of the image."""
    from tensorrt_llm import inputs
    from tensorrt_llm.executor.process import ExecutorProcess

    started: list[Any] = []
    start = ExecutorProcess.wait_until_ready
    monkeypatch.setattr(
        ExecutorProcess, "wait_until_ready", lambda self: (started.append(self), start(self))[0]
    )
    monkeypatch.setattr(inputs.Qwen3InputProcessor, "support_mm_disagg", False)
    with pytest.raises(ConfigurationError, match="could mix up images in its KV cache"):
        TrtllmGenerator(model_of("qwen3_vl"), TrtllmLlmArgs())
    assert [executor.process.poll() for executor in started] == [0], "its process must not be left behind"


def test_what_the_engine_says_at_start_reaches_the_operator(peer: Any, model_of: ModelFactory) -> None:
    with pytest.raises(ConfigurationError, match="could not load the model: Only 1 GPUs are available"):
        TrtllmGenerator(model_of("qwen3_vl"), TrtllmLlmArgs(tensor_parallel_size=2))


def test_ranks_that_mpirun_did_not_start_are_named(
    model_of: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("tllm_mpi_size", "2")
    with pytest.raises(ConfigurationError, match=r"started 2 ranks.*over 4 \(tensor_parallel_size 4 x"):
        TrtllmGenerator(model_of("qwen3_vl"), TrtllmLlmArgs(tensor_parallel_size=4))


def test_what_stands_inside_a_mapping_the_engine_checks_itself(
    peer: Any, model_of: ModelFactory, tmp_path: Path
) -> None:
    path = tmp_path / "pd.yaml"
    path.write_text("kv_cache_config:\n  enable_blok_reuse: true\n")
    with pytest.raises(ConfigurationError, match="enable_blok_reuse"):
        load_generator(model_of("qwen3_vl"), path)


@pytest.mark.parametrize(
    ("given", "reuse"), [({}, True), ({"max_tokens": 9}, True), ({"enable_block_reuse": False}, False)]
)
def test_block_reuse_is_what_the_engine_will_do(given: dict[str, Any], reuse: bool) -> None:
    assert TrtllmLlmArgs(kv_cache_config=given).enable_block_reuse is reuse
    assert TrtllmLlmArgs().enable_block_reuse
