"""The command line: complete help, mistakes answered with the right flag, and what `ask` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.e2e.stack import free_port
from trtllm_mm_cache.cli.ask import AskError, ask_server
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.cli.options import settings_options
from trtllm_mm_cache.flags import is_constant, leaves
from trtllm_mm_cache.settings import (
    AskSettings,
    DropSettings,
    EncodeSettings,
    FrontendSettings,
    ImageLimits,
    MediaSettings,
    PdSettings,
    PlanSettings,
    ServeSettings,
    Settings,
)

ROLES: dict[str, type[Settings]] = {
    "serve": ServeSettings,
    "frontend": FrontendSettings,
    "encode": EncodeSettings,
    "pd": PdSettings,
    "drop": DropSettings,
    "ask": AskSettings,
    "plan": PlanSettings,
}


def flags_of(role: str) -> list[str]:
    return [flag for option in cli.commands[role].params for flag in (*option.opts, *option.secondary_opts)]


def parsed(settings: type[Settings], *arguments: str) -> Settings:
    """Return the settings that a command line of `settings` gives."""
    taken: list[Settings] = []
    command = click.command()(settings_options(settings)(taken.append))
    command(list(arguments), standalone_mode=False)
    return taken[0]


@pytest.mark.parametrize(("role", "settings"), ROLES.items())
def test_every_setting_is_one_flat_flag_and_a_constant_is_none(role: str, settings: type[Settings]) -> None:
    found = list(leaves(settings))
    names = [path[-1] for path, _ in found]
    assert len(set(names)) == len(names), "a flat name would be two settings"
    flags = {f"--{path[-1].replace('_', '-')}" for path, field in found if not is_constant(field)}
    assert sorted(flags) == sorted(flag for flag in flags_of(role) if flag != "arguments")


@pytest.mark.parametrize(("role", "settings"), ROLES.items())
def test_help_shows_every_flag_with_its_description_and_default(role: str, settings: type[Settings]) -> None:
    text = " ".join(CliRunner().invoke(cli, [role, "--help"], terminal_width=400).output.split())
    for path, field in leaves(settings):
        assert field.description
        assert (" ".join(field.description.split()) in text) != is_constant(field), path
        if isinstance(field.default, str | int | float) and not (
            is_constant(field) or field.default is False
        ):
            assert f"default: {field.default}" in text, path


def test_nested_values_arrive_where_they_belong() -> None:
    settings = parsed(
        PdSettings,
        *("--model-path", "m", "--max-file-size-mb", "1", "--max-image-megapixels", "2"),
        *("--allow-private-addresses", "--media-timeout-s", "3", "--engine", "trtllm"),
    )
    assert settings == PdSettings(
        model_path="m",
        engine="trtllm",
        images=ImageLimits(max_file_size_mb=1, max_image_megapixels=2),
        media=MediaSettings(allow_private_addresses=True, media_timeout_s=3),
    )


def test_nothing_given_is_the_settings_own_defaults() -> None:
    assert parsed(EncodeSettings, "--model-path", "m") == EncodeSettings(model_path="m")
    assert parsed(DropSettings) == DropSettings()


class Several(Settings):
    """A setting of several values."""

    url: tuple[str, ...] = ()


def test_a_flag_may_be_repeated_where_the_setting_is_several() -> None:
    assert parsed(Several, "--url", "a", "--url", "b") == Several(url=("a", "b"))


def test_a_variable_counts_where_its_flag_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HTTP_PORT", "8001")
    model = ("--model-path", "m")
    assert parsed(FrontendSettings, *model) == FrontendSettings(model_path="m", http_port=8001)
    assert parsed(FrontendSettings, *model, "--http-port", "8002").http_port == 8002


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pd", "--multimodal-embedding-cache-capacity", "1"], "--multimodal-embedding-cache-capacity-gb"),
        (["encode", "--max-batch-image", "1"], "--max-batch-images"),
        (["pd"], "Missing option '--model-path'"),
        (["pd", "--model-path", "m", "--engine", "onnx"], "'transformers', 'trtllm'"),
        (["pd", "--model-path", "m", "--encode-timeout-s", "0"], "--encode-timeout-s"),
        (["frontend", "--http-port", "99999"], "--http-port"),
        (["pd", "--model-path", "m", "--max-file-size-mb", "0"], "--max-file-size-mb"),
        (["pd", "--model-path", "m", "--max-redirects", "9"], "No such option '--max-redirects'"),
        (["aks"], "ask"),
        (
            ["plan", "--model-path", "m", "--images", "1", "--size", "84"],
            "--size: must be WIDTHxHEIGHT in pixels, as 1024x768, not '84'",
        ),
        (["drop", "--key", "zz"], "--key: must be 64 hexadecimal digits"),
    ],
)
def test_a_mistake_is_answered_with_the_way_out(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_help_loads_no_engine_and_no_transfer_library() -> None:
    code = (
        "import sys\nfrom trtllm_mm_cache.cli.main import cli\ncli(['pd', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'nixl', 'nixl_cu13', 'dynamo'} & sys.modules.keys()\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "trtllm_mm_cache.cli", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trtllm-mm-cache" in ended.stdout


def test_importing_the_package_needs_no_gpu_stack() -> None:
    code = "import sys, trtllm_mm_cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ask_without_a_server_says_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(AskError, match=r"launch/disagg_e_pd\.sh"):
        ask_server([], "Hello?", AskSettings(url=url, timeout_s=5))


def test_ask_names_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AskError, match=r"none\.jpg"):
        ask_server([str(tmp_path / "none.jpg")], "What is this?", AskSettings(url="http://127.0.0.1:9/v1"))
