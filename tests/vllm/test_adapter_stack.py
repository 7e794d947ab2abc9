"""Adapters and log probabilities of the prompt by OpenAI's client, through every process of the product."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from PIL import Image

from tests.e2e.stack import REPOSITORY, Stack, data_url, launched, png
from tests.vllm.adapters import write_adapter
from tests.vllm.models import CARD, DEMO

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

QUESTION = "Where is the yellow cross?"
NAMES = ("cats", "org/dogs-1.5")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("stack")
    folders = {name: write_adapter(DEMO, root / str(seed), seed) for seed, name in enumerate(NAMES)}
    settings = yaml.safe_load((REPOSITORY / "configs/cpu-demo/vllm/pd.yaml").read_text())
    file = root / "pd.yaml"
    file.write_text(yaml.safe_dump(settings | {"lora_modules": {name: str(folders[name]) for name in NAMES}}))
    with launched(
        root / "run",
        *("--multimodal-embedding-cache-capacity-gb", "0.001"),
        script="disagg_multimodal_e_pd.sh",
        ready_timeout_s=300,
        PD_ENGINE_ARGS=str(file),
    ) as running:
        yield running


def ask(stack: Stack, model: str, **more: Any) -> Any:
    """Ask about the card, and return the whole answer."""
    image = {"url": data_url(png(Image.open(CARD).convert("RGB")))}
    content: Any = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
    return stack.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, **more},
    )


def test_models_are_listed_with_their_adapters(stack: Stack) -> None:
    listed = {model.id: (model.model_extra or {}).get("parent") for model in stack.client.models.list()}
    assert listed == {stack.model: None, **dict.fromkeys(NAMES, stack.model)}
    assert stack.client.models.retrieve("org/dogs-1.5").id == "org/dogs-1.5"


def test_one_encode_serves_the_model_and_its_adapters_each_with_its_own_answer(stack: Stack) -> None:
    before = stack.encodes()
    names = (stack.model, *NAMES)
    answers = {name: ask(stack, name) for name in names}
    said = {name: answer.choices[0].message.content for name, answer in answers.items()}
    assert said[stack.model].startswith("top right")
    assert len(set(said.values())) == 3
    assert {name: answer.model for name, answer in answers.items()} == {name: name for name in names}
    with ThreadPoolExecutor(12) as threads:
        again = list(threads.map(lambda name: ask(stack, name).choices[0].message.content, names * 4))
    assert again == [said[name] for name in names * 4], "requests for several at a time do not mix"
    assert stack.encodes() - before == 1


def test_an_unknown_name_is_a_404(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        ask(stack, "birds")


@pytest.mark.parametrize("name", ["", *NAMES[:1]])
def test_log_probabilities_of_the_prompt(stack: Stack, name: str) -> None:
    answer = ask(stack, name or stack.model, prompt_logprobs=2)
    told = answer.model_extra["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == answer.usage.prompt_tokens
    assert all(2 <= len(each) <= 3 for each in told[1:])
    assert all(
        {"logprob", "rank", "decoded_token"} == entry.keys() for each in told[1:] for entry in each.values()
    )
    image_tokens = [
        each for each in told[1:] if "<|image_pad|>" in {e["decoded_token"] for e in each.values()}
    ]
    assert image_tokens, "the prompt is told with its images expanded"
    other = ask(stack, NAMES[1], prompt_logprobs=2).model_extra["prompt_logprobs"]
    assert other != told


def test_too_many_of_them_are_a_400_that_says_the_limit(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt_logprobs: .*more than the 65536"):
        stack.client.completions.create(
            model=stack.model, prompt=[5] * 1500, extra_body={"prompt_logprobs": 20, "n": 3, "temperature": 1}
        )
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: not with stream"):
        list(ask_streamed(stack))


def ask_streamed(stack: Stack) -> Any:
    return stack.client.completions.create(
        model=stack.model, prompt="Hello", stream=True, extra_body={"prompt_logprobs": 1}
    )


def test_a_pd_worker_whose_adapter_changes_the_tower_does_not_start(stack: Stack, tmp_path: Path) -> None:
    """Nothing is started at all: the launch script says why."""
    del stack  # its model and its environment
    folder = write_adapter(DEMO, tmp_path / "tower", 3, rename="visual.")
    settings = yaml.safe_load((REPOSITORY / "configs/cpu-demo/vllm/pd.yaml").read_text())
    file = tmp_path / "pd.yaml"
    file.write_text(yaml.safe_dump(settings | {"lora_modules": {"tower": str(folder)}}))
    with (
        pytest.raises(AssertionError, match="vision tower or projector"),
        launched(
            tmp_path / "run", script="disagg_multimodal_e_pd.sh", ready_timeout_s=60, PD_ENGINE_ARGS=str(file)
        ),
    ):
        pass
