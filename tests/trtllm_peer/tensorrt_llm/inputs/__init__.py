"""The input processors' part in taking embeddings by handle.

`modeling_qwen2vl.py` and `modeling_qwen3vl.py`, 1.3 (`build_disagg_prefill_multimodal_inputs`);
`modeling_llava_next.py`, 1.2 (`get_prompt_token_ids`). Each tokenises the text itself, with the
tokenizer's own special tokens, and expands one placeholder a handle to the handle's rows. The error
types are those of each model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer


class InputProcessor:
    """`support_mm_disagg` tells whether embeddings can come by handle."""

    support_mm_disagg = False

    def __init__(self, model: str | Path) -> None:
        self.config = AutoConfig.from_pretrained(model, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    @property
    def width(self) -> int:
        return int(self.config.text_config.hidden_size)

    def expand(self, inputs: dict[str, Any], handles: list[dict[str, Any]]) -> list[int]:
        """Return the prompt's tokens with each placeholder repeated for its handle's rows."""
        text = inputs.get("prompt")
        if not text:
            raise ValueError("Text prompt is required but not provided")
        if not isinstance(handles, list):
            raise TypeError("mm_handles must be a list")
        token_ids = self.tokenizer(text, return_tensors="pt").input_ids[0].tolist()
        placeholders = [token for token in token_ids if token in self.placeholder_ids]
        self.check(placeholders, handles)
        rows = iter(handle["tensor_size"][0] for handle in handles)
        expanded: list[int] = []
        for token in token_ids:
            expanded += [token] * (next(rows) if token in self.placeholder_ids else 1)
        return expanded

    def check(self, placeholders: list[int], handles: list[dict[str, Any]]) -> None:
        for index, handle in enumerate(handles):
            if handle["tensor_size"][1] != self.width:
                raise RuntimeError(f"Multimodal embedding {index} must match model hidden size {self.width}")
        assert len(placeholders) == len(handles), "Number of images must match number of mm_handles"


class Qwen25InputProcessor(InputProcessor):
    support_mm_disagg = True


class Qwen3InputProcessor(InputProcessor):
    support_mm_disagg = True

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id, self.config.video_token_id)

    @property
    def width(self) -> int:
        return super().width * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def check(self, placeholders: list[int], handles: list[dict[str, Any]]) -> None:
        if len(placeholders) != len(handles):
            raise ValueError(f"placeholders={len(placeholders)}, mm_handles={len(handles)}")
        super().check(placeholders, handles)


class LlavaNextInputProcessor(InputProcessor):
    support_mm_disagg = True

    def check(self, placeholders: list[int], handles: list[dict[str, Any]]) -> None:
        if len(handles) != 1:
            raise NotImplementedError("Only one mm_handle is supported for LlavaNext for now")
        super().check(placeholders, handles)


_PROCESSORS = {
    "qwen2_5_vl": Qwen25InputProcessor,
    "qwen3_vl": Qwen3InputProcessor,
    "llava_next": LlavaNextInputProcessor,
}


def create_input_processor(model: str | Path) -> InputProcessor:
    """Return the input processor of a model; others than these take no handles."""
    model_type = AutoConfig.from_pretrained(model, local_files_only=True).model_type
    return _PROCESSORS.get(model_type, InputProcessor)(model)
