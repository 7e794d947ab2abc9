"""What runs follows from the settings: files, names, and command lines that the roles read back."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import REPOSITORY
from trtllm_mm_cache.cli.options import parse
from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.flags import arguments
from trtllm_mm_cache.serve.model import demo_model, model_config, shipped
from trtllm_mm_cache.serve.plan import make_plan
from trtllm_mm_cache.settings import (
    EncodeSettings,
    EngineSettings,
    FrontendSettings,
    ImageLimits,
    MediaSettings,
    PdSettings,
    ServeSettings,
    WorkerSettings,
)

DEMO = REPOSITORY / "models/shapes-qwen2-vl"
CONFIGS = REPOSITORY / "configs/cpu-demo"
EVERYTHING: dict[str, Any] = {
    "discovery_backend": "etcd",
    "log_level": "DEBUG",
    "log_format": "json",
    "images": ImageLimits(max_file_size_mb=0.5, max_image_megapixels=2),
    "max_waiting_image_mb": 3,
    "transfer_timeout_s": 0.25,
    "encode_endpoint": "dyn://a.b.c",
    "multimodal_embedding_cache_capacity_gb": 1e-3,
    "multimodal_embedding_cache_policy": "s3fifo",
    "multimodal_embedding_cache_require_salt": True,
    "max_images_per_request": 4,
    "media": MediaSettings(allowed_local_media_path=Path("/some where"), allow_private_addresses=True),
}


def shared(settings: WorkerSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in WorkerSettings.model_fields}


def test_a_pd_worker_gets_every_option_of_its_own() -> None:
    plan = make_plan(ServeSettings(**EVERYTHING))
    expected = PdSettings(
        model_path=str(DEMO),
        extra_engine_args=CONFIGS / "pd.yaml",
        served_model_name="shapes-qwen2-vl",
        **EVERYTHING,
    )
    assert plan.pd_arguments()[0] == "pd"
    assert parse(PdSettings, plan.pd_arguments()[1:]) == expected


def test_an_encode_worker_gets_what_must_agree_and_keeps_its_own_defaults() -> None:
    settings = ServeSettings(**EVERYTHING, encode_extra_args="--max-batch-images 3 --log-level 'ERROR'")
    role, *line = make_plan(settings).encode_arguments()
    encode = parse(EncodeSettings, line)
    assert role == "encode"
    assert shared(encode) == {**shared(settings), "log_level": "ERROR"}
    assert (encode.endpoint, encode.max_batch_images) == ("dyn://a.b.c", 3)
    assert encode.extra_engine_args == CONFIGS / "encode.yaml"
    assert encode.multimodal_embedding_cache_capacity_gb == 0.25, "the PD workers' capacity is theirs"


def test_the_frontend_gets_every_setting_that_it_has_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_CACHE_LOG_FORMAT", "json")
    settings = ServeSettings(http_port=8123, log_level="WARNING", log_format="text")
    role, *line = make_plan(settings).frontend_arguments()
    assert role == "frontend"
    frontend = parse(FrontendSettings, line)
    assert (frontend.http_port, frontend.log_level) == (8123, "WARNING")
    assert frontend.log_format == "text", "what a variable says otherwise is given although it is the default"


def test_what_is_the_default_is_not_given() -> None:
    assert arguments(ServeSettings(), EngineSettings) == [
        *("--discovery-backend", "file"),
        *("--log-format", "text"),
    ]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/nowhere/model", "is not a directory"),
        ("./model", "is not a directory"),
        ("model", "OWNER/NAME"),
        ("models/mistyped", "is not a directory"),
    ],
)
def test_a_model_that_is_no_directory_and_no_hub_name_is_refused(
    model: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigurationError, match=says):
        model_config(model)


def test_a_hub_name_is_checked_against_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE is set"):
        model_config("owner/model")
    snapshot = tmp_path / "models--owner--model/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert model_config("owner/model") == {"model_type": "mamba"}
    with pytest.raises(ConfigurationError, match="does not serve the architecture 'mamba'"):
        make_plan(ServeSettings(model_path="owner/model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert model_config("owner/new") == {}


def test_several_ranks_run_under_mpirun() -> None:
    assert make_plan(ServeSettings()).job() == []
    assert make_plan(ServeSettings(pd_ranks=2)).job()[:5] == ["mpirun", "-n", "2", "--bind-to", "none"]


def test_without_mpirun_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ConfigurationError, match=r"PD_RANKS=2 needs mpirun: pip install 'trtllm-mm-cache\[mpi\]'"
    ):
        make_plan(ServeSettings(pd_ranks=2))


def test_what_a_second_shell_would_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = REPOSITORY / "tests/trtllm_peer"
    monkeypatch.syspath_prepend(str(peer))
    model = tmp_path / "with space"
    model.mkdir()
    for file in DEMO.iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((DEMO / "config.json").read_bytes())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    files = REPOSITORY / "configs/qwen2.5-vl-7b-instruct"
    settings = ServeSettings(
        engine="trtllm",
        model_path=str(model),
        extra_engine_args=files / "pd.yaml",
        encode_engine_args=files / "encode.yaml",
        pd_ranks=2,
    )
    with pytest.raises(ConfigurationError, match="would not survive trtllm-llmapi-launch"):
        make_plan(settings)


def test_the_wheel_brings_what_is_looked_for_where_it_is_looked_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {name: f"trtllm_mm_cache/shipped/{name}" for name in included}
    assert all((REPOSITORY / name).exists() for name in included)
    needed = [demo_model(), shipped("configs") / "cpu-demo", shipped("models") / "card.png"]
    for path in needed:
        relative = path.relative_to(REPOSITORY)
        assert any(relative.is_relative_to(name) for name in included), relative


def test_an_engine_without_a_tower_cannot_be_aggregated() -> None:
    with pytest.raises(ConfigurationError, match="transformers has no vision tower of its own"):
        make_plan(ServeSettings(engine="transformers", disaggregation_mode="agg"))
