"""Training computes what transformers computes, sees the same data in every run, and survives a stop."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.engines.contract import reference_model, reference_processor
from tools.demo_model.data import BatchMaker, BatchShape
from tools.demo_model.model import make_config, new_model, save_model
from tools.demo_model.pictures import draw
from tools.demo_model.tokenizer import make_tokenizer
from tools.demo_model.tower import encode_all, read
from tools.demo_model.training import Plan, Training


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_every_question_of_a_batch_is_the_prompt_that_serving_sends(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The logits of all answers of a batch equal those of one-question prompts, run by transformers."""
    model_dir = tmp_path / "untrained"
    save_model(new_model(make_config(tokenizer), seed=1), tokenizer, model_dir)
    model, processor = reference_model(model_dir), reference_processor(model_dir)
    maker = BatchMaker(tokenizer, 5, BatchShape(scenes=1, pairs=1, questions=3))
    scenes, rows = maker.rows(0)
    batch = maker.batch(0)
    with torch.inference_mode():
        logits = read(model, batch, encode_all(model, batch.pictures)).logits
        expected = []
        for row in rows:
            images = [draw(scenes[index]) for index in row.scenes]
            for question in row.questions:
                content = [{"type": "text", "text": question.text}, *[{"type": "image"}] * len(images)]
                prompt = processor.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
                answer = tokenizer(question.answer)["input_ids"]
                inputs = processor(images=images, text=prompt + question.answer, return_tensors="pt")
                model.model.rope_deltas = None
                expected.append(model(**inputs).logits[0, -len(answer) - 1 :])
    assert len(expected) == len(batch.kinds) >= 7
    difference = (logits - torch.cat(expected)).abs().max() / logits.std()
    assert difference < 1e-4


def test_targets_are_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = BatchMaker(tokenizer, 5, BatchShape())
    _, rows = maker.rows(3)
    batch = maker.batch(3)
    answers = [tokenizer.decode(tokens) for tokens in batch.targets.split(batch.answer_lengths)]
    assert answers == [f"{question.answer}<|im_end|>" for row in rows for question in row.questions]


def test_a_resumed_run_is_an_uninterrupted_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def plan(steps: int) -> Plan:
        return Plan(seed=3, steps=steps, seeing=2, fall=1, warm_up=1)

    whole = Training(plan(4), tokenizer, tmp_path / "whole")
    whole.run()
    for steps in (1, 3, 4):
        part = Training(plan(steps), tokenizer, tmp_path / "parts")
        part.run()
    assert part.step == whole.step == 4
    for (name, expected), actual in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_a_few_steps_make_the_tower_read_cells_better(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(Plan(seed=0, steps=12, seeing=12, fall=1, warm_up=1), tokenizer, tmp_path)
    maker = BatchMaker(tokenizer, 99, BatchShape())
    before = training.cells_loss(maker.pictures(0))
    training.run()
    assert training.cells_loss(maker.pictures(0)) < before - 1
    assert "12/12" in capsys.readouterr().err


def test_the_tokenizer_is_the_same_every_time_and_loses_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()
    letters = [chr(random.Random(seed).randrange(32, 0x2FFF)) for seed in range(200)]
    for text in ("red circle at the top left", "the number 407 in blue", "Ünïcödé 日本 🙂", "".join(letters)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("What is left of the orange triangle?")["input_ids"]) == 8
