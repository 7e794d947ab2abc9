"""ENGINE=trtllm end to end, with the peer of TensorRT-LLM in `tests/trtllm_peer`.

The launch script, Dynamo's frontend, both workers, NIXL, the arena and the adapter run as on a GPU machine,
with the engine configuration of Qwen2.5-VL-7B; the engine's two processes are the peer's. The model is a
tiny Qwen2.5-VL, and what it must answer is what Hugging Face's `generate(pixel_values)` answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import openai
import pytest
from PIL import Image

from tests.e2e.conftest import generate_answer
from tests.e2e.stack import REPOSITORY, Stack, free_port, launched, message, new_image
from tests.engines.contract import chat_case
from tools.tiny_models import make_tiny_model

QUESTION = "What is this?"
PEER = REPOSITORY / "tests/trtllm_peer"
HITS = "dynamo_component_embedding_cache_hits_total"

Answer = Callable[[Sequence[Image.Image], Sequence[str]], str]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model") / "Qwen2.5-VL-7B-Instruct")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Stack]:
    path = os.pathsep.join([str(PEER), *filter(None, [os.environ.get("PYTHONPATH")])])
    with launched(
        tmp_path_factory.mktemp("stack") / "run",
        "--multimodal-embedding-cache-capacity-gb",
        "0.0625",
        ENGINE="trtllm",
        MODEL_PATH=str(model_dir),
        PYTHONPATH=path,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def answer_of(model_dir: Path) -> Answer:
    """An answer that ends in the middle of a character ends before it."""
    return lambda images, texts: generate_answer(chat_case(model_dir, list(images), texts), 8).rstrip(
        "\ufffd"
    )


def test_a_picture_is_encoded_once_and_answered_as_by_the_model_itself(
    stack: Stack, answer_of: Answer
) -> None:
    (pd,) = stack.workers("PD")
    before, picture = stack.encodes(), new_image(128, 96)
    expected = answer_of([picture], ["", QUESTION])
    assert stack.ask(picture, QUESTION) == expected
    hits = pd.metric(HITS)
    assert stack.ask(picture, QUESTION) == expected
    assert pd.metric(HITS) == hits + 1
    assert stack.encodes() == before + 1


def test_images_of_several_shapes_cached_and_new_in_one_prompt(stack: Stack, answer_of: Answer) -> None:
    known, wide, tall = new_image(96, 96), new_image(160, 64), new_image(64, 192)
    stack.ask(known, QUESTION)
    before = stack.encodes()
    first = answer_of([wide, known, tall], ["", " and ", " or ", QUESTION])
    assert stack.ask(wide, " and ", known, " or ", tall, QUESTION) == first
    assert stack.encodes() == before + 2
    turned = answer_of([tall, known, wide], ["", " and ", " or ", QUESTION])
    assert turned != first, "the order of images must matter to the model, or this test shows nothing"
    assert stack.ask(tall, " and ", known, " or ", wide, QUESTION) == turned
    assert stack.encodes() == before + 2


def test_text_alone(stack: Stack, answer_of: Answer) -> None:
    assert stack.ask("Tell me a story") == answer_of([], ["Tell me a story"])


def test_streaming_and_usage_count_the_expanded_prompt(stack: Stack, answer_of: Answer) -> None:
    picture = new_image(112, 112)
    chunks = list(
        stack.client.chat.completions.create(
            model=stack.model,
            messages=[message(picture, QUESTION)],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == answer_of([picture], ["", QUESTION])
    assert sum(piece != "" for piece in pieces) > 1
    text_only = stack.client.chat.completions.create(
        model=stack.model, messages=[message(QUESTION)], max_tokens=1
    ).usage
    usage = chunks[-1].usage
    assert usage is not None
    assert text_only is not None
    # 112 x 112 pixels in patches of 14, merged 2 x 2: 16 rows; and two markers around them.
    assert usage.prompt_tokens == text_only.prompt_tokens + 16 + 2


def test_a_client_that_leaves_aborts_the_engines_request_and_leaves_no_lease(stack: Stack) -> None:
    (pd,) = stack.workers("PD")
    stack.leave_an_answer()
    assert "outcome=stopped" in pd.log.read_text()
    assert stack.ask("Still there?")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"extra_body": {"mm_processor_kwargs": {"max_pixels": 9}}}, "mm_processor_kwargs.max_pixels"),
        ({"seed": -1, "temperature": 1.0}, "seed must not be negative"),
    ],
    ids=["processor", "seed"],
)
def test_what_the_engine_cannot_do_is_said_not_dropped(
    stack: Stack, options: dict[str, object], says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        stack.ask(new_image(), QUESTION, **options)


def test_a_salt_keeps_tenants_apart_and_changes_no_answer(stack: Stack, answer_of: Answer) -> None:
    picture = new_image()
    expected, before = answer_of([picture], ["", QUESTION]), stack.encodes()
    for salt in ("one", "two", "one"):
        salted = {"nvext": {"cache_salt": salt}}
        assert stack.ask(picture, QUESTION, extra_body=salted) == expected
    assert stack.encodes() == before + 2


def test_the_logs_say_how_embeddings_reach_the_engine_and_warn_of_nothing(stack: Stack) -> None:
    (pd,) = stack.workers("PD")
    log = pd.log.read_text()
    assert "by handle, keyed by their content; KV block reuse is on" in log
    assert "outside the releases" not in log


@pytest.mark.parametrize(
    "arguments",
    [["--served-model-name", "my model"], ["--allowed-local-media-path", "/data/*"]],
    ids=["space", "star"],
)
def test_several_ranks_refuse_arguments_that_the_mpi_launcher_would_split(
    tmp_path: Path, model_dir: Path, arguments: list[str]
) -> None:
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(PEER), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RUN_DIR": str(tmp_path),
        "DYN_HTTP_PORT": str(free_port()),
        "ENGINE": "trtllm",
        "PD_RANKS": "2",
        "MODEL_PATH": str(model_dir),
    }
    ended = subprocess.run(
        [str(REPOSITORY / "launch/disagg_e_pd.sh"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "would not survive trtllm-llmapi-launch" in ended.stderr
