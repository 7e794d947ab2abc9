"""What every engine must hold to, as functions: the embedding path gives what the model itself gives.

The reference is plain Hugging Face in one process: the model's own processor, the whole model,
`generate(pixel_values)`. It shares no code with the engine except the processor classes of
transformers. The functions take a model directory, so that the same comparison can run over other
ways for an embedding to travel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from trtllm_mm_cache.engines.base import GenerationRequest, SamplingParams


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return an RGB image with large and small structure, the same for the same arguments."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int64) + noise, 0, 255).astype(np.uint8))


PICTURES = ((1, 120, 80), (2, 60, 150), (3, 91, 90))
"""Seeds and sizes of three pictures: landscape, portrait, almost square."""


def pictures(count: int) -> list[Image.Image]:
    """Return the first `count` of `PICTURES`."""
    return [picture(*arguments) for arguments in PICTURES[:count]]


@functools.cache
def reference_processor(model_dir: Path) -> Any:
    """Return the model's own processor; its video part, which needs torchvision, is left out."""
    config = AutoConfig.from_pretrained(model_dir)
    processor_class = PROCESSOR_MAPPING[type(config)]

    class WithoutVideo(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is not None:
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(model_dir, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(model_dir),
    }
    settings, _ = processor_class.get_processor_dict(model_dir)
    return WithoutVideo.from_args_and_dict(
        [parts.get(name) for name in processor_class.get_attributes()], settings
    )


@functools.lru_cache(maxsize=1)
def reference_model(model_dir: Path) -> Any:
    """Return the whole model in float32."""
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()


def chat(model_dir: Path, *parts: str | None) -> str:
    """Render one user message; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    )


def request_for(
    model_dir: Path,
    prompt: str,
    *,
    with_text: bool = True,
    add_special_tokens: bool = False,
    sampling: SamplingParams = SamplingParams(max_tokens=4),
) -> GenerationRequest:
    """Return the request that a frontend makes of a rendered prompt: one placeholder for each image."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    token_ids = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    return GenerationRequest("request", tuple(token_ids), prompt if with_text else None, sampling)


def reference_inputs(
    model_dir: Path, prompt: str, images: Sequence[Image.Image], *, add_special_tokens: bool = False
) -> dict[str, Any]:
    """Return what the model's own processor makes of the prompt and its images."""
    processor = reference_processor(model_dir)
    return dict(
        processor(
            images=[list(images)] if images else None,
            text=prompt,
            return_tensors="pt",
            text_kwargs={"add_special_tokens": add_special_tokens},
        )
    )


def reference_logits(inputs: dict[str, Any], model_dir: Path) -> torch.Tensor:
    """Return `[vocabulary]`: the logits that `generate(pixel_values)` starts its answer from."""
    model = reference_model(model_dir)
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.logits[0][0]


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless both have the same dtype, shape and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert torch.equal(actual, expected), f"largest difference {difference}"


def assert_clearly_different(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail when a change that must show moves no logit by more than a rounding error would."""
    difference = (actual - expected).abs().max().item()
    assert difference > 1e-2, f"largest difference {difference}"
