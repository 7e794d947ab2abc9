"""Score a model directory on held-out pictures, and with the embeddings of other pictures.

The model runs as a user of transformers would run it: its own image processor, chat template and
`generate`. Nothing of the training's code is below.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .pictures import GRIDS, Scene, draw, random_scene
from .questions import KINDS, Question, ask

SHARES: Mapping[str, int] = {
    "colour": 12,
    "shape": 10,
    "count": 10,
    "where": 10,
    "place": 10,
    "neighbour": 10,
    "number": 10,
    "exists": 4,
    "describe": 8,
    "which picture": 4,
    "in one picture": 12,
}
"""Kinds in a hundred questions. The two that a coin answers half of are few."""


@dataclass(frozen=True)
class Case:
    """A question about pictures that were drawn for it alone."""

    scenes: tuple[Scene, ...]
    question: Question


def held_out(count: int, seed: int) -> list[Case]:
    """Return `count` questions, mixed as `SHARES` says; pictures that training does not draw."""
    rng = random.Random(f"held-out/{seed}")
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    mixed = [kinds[index * len(kinds) // count % len(kinds)] for index in range(count)]
    return [_case(kind, rng) for kind in mixed]


def _case(kind: str, rng: random.Random) -> Case:
    pictures, _ = KINDS[kind]
    while True:
        scenes = tuple(random_scene(rng) for _ in range(pictures))
        if (question := ask(scenes, kind, rng)) is not None:
            return Case(scenes, question)


class Answerer:
    """The model of a directory, in float32, answering greedily. One call at a time."""

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._images = AutoImageProcessor.from_pretrained(model_dir, backend="pil")
        self._model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()

    def answer(self, pictures: Sequence[Image.Image], question: str) -> str:
        """Return the answer to `question` about `pictures`: `generate(pixel_values)`."""
        images = self._images(list(pictures), return_tensors="pt")
        return self._generate(self._prompt(question, images["image_grid_thw"]), **images)

    @torch.inference_mode()
    def answer_with(
        self, pictures: Sequence[Image.Image], question: str, embedded: Sequence[Image.Image]
    ) -> str:
        """Return the answer when the embeddings are those of the pictures `embedded`, of equal sizes."""
        images = self._images(list(embedded), return_tensors="pt")
        grids = self._images(list(pictures), return_tensors="pt")["image_grid_thw"]
        if not torch.equal(grids, images["image_grid_thw"]):
            raise ValueError("the pictures and those that stand in for them differ in size")
        features = self._model.get_image_features(**images).pooler_output
        output = BaseModelOutputWithPooling(pooler_output=features)
        prompt = self._prompt(question, grids)
        return self._generate(prompt, image_grid_thw=grids, mm_encoder_outputs={"image": output})

    def _prompt(self, question: str, grids: torch.Tensor) -> str:
        """Return the chat of one message, each picture's placeholder as often as it has tokens."""
        content = [{"type": "image"} for _ in grids] + [{"type": "text", "text": question}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        parts = text.split("<|image_pad|>")
        counts = (int(grid.prod()) // self._images.merge_size**2 for grid in grids)
        return parts[0] + "".join(
            "<|image_pad|>" * count + part for count, part in zip(counts, parts[1:], strict=True)
        )

    @torch.inference_mode()
    def _generate(self, prompt: str, **images: Any) -> str:
        ids = torch.tensor([self._tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        types = (ids == self._model.config.image_token_id).int()
        self._model.model.rope_deltas = None
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            max_new_tokens=48,
            do_sample=False,
            **images,
        )
        return str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True)
class Result:
    """What the model said to one case: from its pictures, and from the embeddings of others."""

    case: Case
    answer: str
    answer_from_others: str

    @property
    def right(self) -> bool:
        """Whether the answer is the truth, letter by letter."""
        return self.answer == self.case.question.answer

    @property
    def misled(self) -> bool:
        """Whether the embeddings of other pictures gave another answer."""
        return self.answer_from_others != self.answer


def score(model_dir: Path, cases: Iterable[Case], seed: int) -> Iterator[Result]:
    """Yield the result of each case; `seed` decides the other pictures, which have the same sizes."""
    answerer = Answerer(model_dir)
    rng = random.Random(f"others/{seed}")
    for case in cases:
        pictures = [draw(scene) for scene in case.scenes]
        others = [draw(random_scene(rng, (scene.rows, scene.columns))) for scene in case.scenes]
        text = case.question.text
        yield Result(case, answerer.answer(pictures, text), answerer.answer_with(pictures, text, others))


@dataclass(frozen=True)
class Line:
    """A line of the score table: of `asked` questions `right` were answered truly, `kept` also by others."""

    name: str
    asked: int
    right: int
    kept: int


def table(results: Sequence[Result]) -> list[Line]:
    """Return a line for each kind, each number of pictures, each size of a single one, and all."""
    groups: dict[str, Callable[[Result], bool]] = {
        kind: lambda result, kind=kind: result.case.question.kind == kind for kind in SHARES
    }
    for rows, columns in GRIDS:
        name = f"one picture of {columns} x {rows} cells"
        groups[name] = lambda result, grid=(rows, columns): (
            [(scene.rows, scene.columns) for scene in result.case.scenes] == [grid]
        )
    groups["two pictures"] = lambda result: len(result.case.scenes) == 2
    groups["all"] = lambda _: True
    return [_line(name, [result for result in results if chosen(result)]) for name, chosen in groups.items()]


def _line(name: str, results: Sequence[Result]) -> Line:
    kept = sum(not result.misled for result in results)
    return Line(name, len(results), sum(result.right for result in results), kept)
