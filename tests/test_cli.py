"""The command line: complete help, mistakes answered with the right flag, and what `ask` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from trtllm_mm_cache.runtime.media_limits import image_limits

from tests.e2e.stack import free_port
from trtllm_mm_cache.cli.ask import AskError, ask_server
from trtllm_mm_cache.cli.main import cli
from trtllm_mm_cache.cli.options import settings_options
from trtllm_mm_cache.media import MediaSettings
from trtllm_mm_cache.settings import EncodeSettings, FrontendSettings, PdSettings, Settings

ROLES = {"frontend": FrontendSettings, "encode": EncodeSettings, "pd": PdSettings}


@pytest.mark.parametrize(("role", "settings"), ROLES.items())
def test_help_shows_every_setting_with_its_description(role: str, settings: type[Settings]) -> None:
    text = " ".join(CliRunner().invoke(cli, [role, "--help"]).output.split())
    for name, field in settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        assert " ".join(field.description.split()[:3]) in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pd", "--multimodal-embedding-cache-capacity", "1"], "--multimodal-embedding-cache-capacity-gb"),
        (["encode", "--max-batch-image", "1"], "--max-batch-images"),
        (["pd"], "Missing option '--model-path'"),
        (["pd", "--model-path", "m", "--engine", "onnx"], "'transformers', 'trtllm'"),
        (["pd", "--model-path", "m", "--encode-timeout-s", "0"], "--encode-timeout-s"),
        (["frontend", "--http-port", "99999"], "--http-port"),
        (["aks"], "ask"),
        (
            ["plan", "--model", "m", "--images", "1", "--size", "84"],
            "--size: must be WIDTHxHEIGHT in pixels, as 1024x768, not '84'",
        ),
        (["drop", "--key", "zz"], "--key: must be 64 hexadecimal digits"),
    ],
)
def test_a_mistake_is_answered_with_the_way_out(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("arguments", "formats"),
    [
        ([], frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"})),
        (["--image-formats", "PNG", "--image-formats", "JPEG"], frozenset({"PNG", "JPEG"})),
    ],
)
def test_limits_on_images_reach_what_reads_them(arguments: list[str], formats: frozenset[str]) -> None:
    taken: list[EncodeSettings] = []

    @click.command()
    @settings_options(EncodeSettings)
    def command(settings: EncodeSettings) -> None:
        taken.append(settings)

    limits = ["--max-file-size-mb", "1", "--max-image-megapixels", "2", "--max-image-side", "3"]
    command(
        ["--model-path", "m", *limits, "--max-image-aspect-ratio", "4", *arguments], standalone_mode=False
    )
    assert MediaSettings(**image_limits(taken[0])) == MediaSettings(
        max_file_size_bytes=1024**2,
        max_image_pixels=2_000_000,
        max_image_side=3,
        max_image_aspect_ratio=4,
        image_formats=formats,
    )


def test_help_loads_no_engine_and_no_transfer_library() -> None:
    code = (
        "import sys\nfrom trtllm_mm_cache.cli.main import cli\ncli(['pd', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'nixl', 'nixl_cu13', 'dynamo'} & sys.modules.keys()\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_needs_no_gpu_stack() -> None:
    code = "import sys, trtllm_mm_cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ask_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(AskError, match=r"launch/disagg_e_pd\.sh"):
        ask_server([], "Hello?", url=url, model=None, max_tokens=1, temperature=0, timeout=5)


def test_ask_names_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AskError, match=r"none\.jpg"):
        ask_server(
            [str(tmp_path / "none.jpg")],
            "What is this?",
            url="http://127.0.0.1:9/v1",
            model="m",
            max_tokens=1,
            temperature=0,
            timeout=5,
        )
