"""Encode workers in an environment of their own beside SGLang's: two releases of transformers, one cache.

`SGLANG_TEST_ENCODE_PYTHON` names that environment's Python: one with the extra `transformers`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import yaml
from PIL import Image

from tests.e2e.stack import Stack, launched
from tests.sglang.models import CARD, DEMO, ROOT

VARIABLE = "SGLANG_TEST_ENCODE_PYTHON"
QUESTION = "Where is the yellow cross?"
READY_S = 560

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),  # two engines are started, one after the other
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no second environment"),
]


def release_in(python: str) -> str:
    """Return the release of transformers that a Python has."""
    line = "import importlib.metadata; print(importlib.metadata.version('transformers'))"
    told = subprocess.run([python, "-c", line], capture_output=True, text=True, check=True, timeout=60)
    return told.stdout.strip()


def pd_file(folder: Path, **changes: str) -> Path:
    """Write the demo model's engine file with `changes`, and return it."""
    settings = yaml.safe_load((ROOT / "configs/cpu-demo/sglang/pd.yaml").read_text())
    file = folder / "pd.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


@pytest.fixture
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """The stack; with the parameter "told", `pd.yaml` names the encode workers' release of transformers."""
    python = os.environ[VARIABLE]
    changes = {"encoder_transformers": release_in(python)} if request.param == "told" else {}
    with launched(
        tmp_path / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.125",
        ready_timeout_s=READY_S,
        ENGINE="sglang",
        MODEL_PATH=str(DEMO),
        ENCODE_PYTHON=python,
        PD_ENGINE_ARGS=str(pd_file(tmp_path, **changes)),
        PYTHONPATH=str(ROOT),
    ) as running:
        yield running


def test_the_environments_differ() -> None:
    assert release_in(os.environ[VARIABLE]) != release_in(sys.executable), "one environment would do"


@pytest.mark.parametrize("stack", ["told"], indirect=True)
def test_answers_are_true(stack: Stack) -> None:
    """And each image is encoded once, in the other environment."""
    card = Image.open(CARD).convert("RGB")
    (encoder,) = stack.workers("encode")
    assert psutil.Process(encoder.pid).cmdline()[0] == os.environ[VARIABLE]
    for _ in range(2):
        assert stack.ask(card, QUESTION) == "top right"
        assert stack.ask(card.transpose(Image.Transpose.ROTATE_180), QUESTION) == "bottom left"
    assert stack.encodes() == 2


@pytest.mark.parametrize("stack", ["untold"], indirect=True)
def test_a_release_that_the_pd_worker_does_not_expect_is_refused(stack: Stack) -> None:
    """Two releases may prepare an image differently: nothing is taken from one for the other."""
    with pytest.raises(openai.APIStatusError) as refused:
        stack.ask(Image.open(CARD).convert("RGB"), QUESTION)
    assert refused.value.status_code == 503
    assert "protocol_mismatch" in str(refused.value)
    assert "releases of transformers" in str(refused.value)
    assert stack.ask("Hello", max_tokens=1) is not None, "text is served"
