"""What every engine must hold to, as functions: the embedding path gives what the model itself gives.

The reference is plain Hugging Face in one process: the model's own processor, the whole model,
`generate(pixel_values)`. It shares no code with the engine; only transformers is below both. How an
embedding gets from the encoder to the generator is a parameter (`Carry`), so that the same
comparison runs over every way for it to travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from trtllm_mm_cache.cache.manager import Lease
from trtllm_mm_cache.engines.base import EncodeItem, GenerationRequest, SamplingParams

ARCHITECTURES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "smolvlm",
    "idefics3",
    "gemma3",
)
WITH_GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

Carry = Callable[[Sequence[EncodeItem]], list[Lease]]
"""Encode the items one by one and return a lease on each embedding, as the generator gets it."""


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return an RGB image with large and small structure, the same for the same arguments."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int64) + noise, 0, 255).astype(np.uint8))


def pictures(count: int) -> list[Image.Image]:
    """Return up to three pictures: landscape, portrait, almost square."""
    return [picture(1, 120, 80), picture(2, 60, 150), picture(3, 91, 90)][:count]


@dataclass(frozen=True)
class Case:
    """A prompt with its images, and the request that a frontend makes of it."""

    model_dir: Path
    prompt: str
    images: list[Image.Image]
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    with_text: bool = True

    @property
    def request(self) -> GenerationRequest:
        """One placeholder for each image, tokenised as the frontend does; `with_text` sends the text too."""
        tokenizer = reference_processor(self.model_dir).tokenizer
        token_ids = tokenizer(self.prompt, add_special_tokens=self.add_special_tokens)["input_ids"]
        text = self.prompt if self.with_text else None
        return GenerationRequest("request", tuple(token_ids), text, SamplingParams(max_tokens=4))

    def items(self, variant: str) -> list[EncodeItem]:
        """Return what the encode worker gets."""
        return [EncodeItem(image, self.processor_kwargs, variant) for image in self.images]


def chat_case(
    model_dir: Path, images: Sequence[Image.Image], texts: Sequence[str] | None = None, **options: Any
) -> Case:
    """Return a chat of one user message with the images between `texts`, one text more than images.

    The default texts put newlines, spaces and words next to the placeholders.
    """
    if texts is None:
        texts = ["Look:\n", *["\n\nand this \n\n\n"] * (len(images) - 1), "\nWhat is it?"]
        texts = texts if images else ["Hello\n\nthere!"]
    content = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    prompt = reference_processor(model_dir).tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return Case(model_dir, prompt, list(images), **options)


@functools.cache
def reference_processor(model_dir: Path) -> Any:
    """Return the model's own processor; its video part, which needs torchvision, is left out."""
    processor_class = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model_dir))]

    class WithoutVideo(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(model_dir, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(model_dir),
    }
    settings, _ = processor_class.get_processor_dict(model_dir)
    return WithoutVideo.from_args_and_dict(
        [parts.get(name) for name in processor_class.get_attributes()], settings
    )


@functools.cache
def reference_model(model_dir: Path) -> Any:
    """Return the whole model in float32."""
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()


def reference_inputs(case: Case) -> dict[str, Any]:
    """Return what the model's own processor makes of the case, images nested as its chat method does."""
    return dict(
        reference_processor(case.model_dir)(
            images=[case.images] if case.images else None,
            text=case.prompt,
            return_tensors="pt",
            text_kwargs={"add_special_tokens": case.add_special_tokens},
            images_kwargs=dict(case.processor_kwargs),
        )
    )


def reference_logits(case: Case) -> torch.Tensor:
    """Return `[vocabulary]`: the logits that `generate(pixel_values)` starts its answer from."""
    model = reference_model(case.model_dir)
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    output = model.generate(
        **reference_inputs(case),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0][0]


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless both have the same dtype, shape and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert torch.equal(actual, expected), f"largest difference {difference}"


def assert_same_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless no logit differs by more than the order of additions in float32 explains.

    For prompts of several images: the reference encodes them in one batch, this package one by one.
    """
    assert actual.shape == expected.shape
    difference = ((actual - expected).abs().max() / expected.std()).item()
    assert difference < 1e-4, f"largest difference {difference} of the logits' standard deviation"


def assert_clearly_different(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail when a change that must show moves no logit by more than rounding could, by far."""
    difference = ((actual - expected).abs().max() / expected.std()).item()
    assert difference > 1e-2, f"largest difference {difference} of the logits' standard deviation"


def assert_logits_are_the_models_own(generator: Any, case: Case, leases: Sequence[Lease]) -> None:
    """The contract: to the last bit with at most one image, up to rounding with several."""
    actual, expected = generator.prefill_logits(case.request, leases), reference_logits(case)
    if len(case.images) <= 1:
        assert_bit_equal(actual, expected)
    else:
        assert_same_up_to_rounding(actual, expected)
