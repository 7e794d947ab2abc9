"""Aggregated: vLLM's own vision tower encodes what the cache does not have."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trtllm_mm_cache.cache.arena.handle import Handle
from trtllm_mm_cache.cache.arena.region import create_shared_storage
from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import EmbeddingShape, EncodeItem
from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.engines.huggingface.architectures import Architecture
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.processor_kwargs import configured_bounds, image_kwargs
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.own_tower import PreparedItem
from trtllm_mm_cache.engines.vllm.generator import VllmGenerator
from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
from trtllm_mm_cache.engines.vllm.support import Tower
from trtllm_mm_cache.errors import EmbeddingMismatchError, InvalidImageError

_COUNTER_BYTES = 64


class VllmOwnTowerGenerator(VllmGenerator):
    """`OwnTowerGenerator` over `AsyncLLM`. For use from one event loop."""

    def __init__(self, model_path: Path, args: VllmEngineArgs, *, kept: bool) -> None:
        """Load the model; `kept` says whether embeddings are. Blocking. Raises `ConfigurationError`."""
        self._encodes = torch.empty(0, dtype=torch.int64)
        encodes = None
        if kept:
            self._encodes.set_(create_shared_storage(_COUNTER_BYTES), 0, (1,), (1,))
            encodes = Handle.of(self._encodes)
        super().__init__(model_path, args, Tower(own=True, encodes=encodes))
        preparer = self._prepare
        self._pixels = PixelPreparer(
            self._llm.renderer.get_mm_processor(), preparer.architecture, preparer.layout, preparer.expander
        )
        # vLLM runs its processors in one thread too: their tokenizers are not for several.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels")

    @property
    def encodes(self) -> int:
        """See `OwnTowerGenerator.encodes`; 0 where nothing is kept."""
        return int(self._encodes.sum())

    async def prepare(self, item: EncodeItem) -> PreparedItem:
        """See `OwnTowerGenerator.prepare`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(self._pixels, item))

    async def close(self) -> None:
        """See `Generator.close`."""
        await super().close()
        await asyncio.to_thread(self._thread.shutdown)


class PixelPreparer:
    """vLLM's own multimodal processor over one image at a time. Not thread-safe."""

    def __init__(
        self, processor: Any, architecture: Architecture, layout: FeatureLayout, expander: PromptExpander
    ) -> None:
        self._processor = processor
        self._architecture = architecture
        self._layout = layout
        self._expander = expander
        self._tokenizer = expander.processor.tokenizer
        self._bounds = configured_bounds(expander.processor)
        self._prompt = [self._tokenizer.convert_tokens_to_ids(expander.processor.image_token)]

    def __call__(self, item: EncodeItem) -> PreparedItem:
        """Return the image as vLLM's tower takes it. Raises as `OwnTowerGenerator.prepare`."""
        kwargs = image_kwargs(item.processor_kwargs, self._architecture.request_kwargs, self._bounds)
        try:
            processed = self._process(item, kwargs)
        except (ValueError, TypeError, OSError, ArithmeticError, LookupError, RuntimeError) as error:
            width, height = item.image.size
            reason = fit_for_client(error, f"its processor refuses {width}x{height} pixels")
            raise InvalidImageError(f"the model cannot take this image: {reason}") from error
        (pixels,), (place,) = processed["mm_kwargs"]["image"], processed["mm_placeholders"]["image"]
        tokens = processed["prompt_token_ids"][place.offset : place.offset + place.length]
        metadata = EmbeddingMetadata(self._grid(pixels), self._text_of(tokens))
        rows = self._expander.rows_of(metadata.placeholder or "")
        if rows != place.get_num_embeds():
            raise EmbeddingMismatchError(
                f"vLLM takes {place.get_num_embeds()} rows for an image whose placeholder has room for {rows}"
            )
        shape = EmbeddingShape(rows, self._layout.hidden * (1 + self._layout.levels), self._layout.dtype)
        return PreparedItem(pixels, _nbytes(pixels), shape, metadata)

    def _process(self, item: EncodeItem, kwargs: dict[str, Any]) -> Any:
        from vllm.multimodal.processing import ProcessorInputs, TimingContext

        items = self._processor.info.parse_mm_data({"image": [item.image]})
        # The name is of no account: requests name the image by its key.
        inputs = ProcessorInputs(self._prompt, items, {"image": ["image"]}, hf_processor_mm_kwargs=kwargs)
        return self._processor.apply(inputs, TimingContext(enabled=False))

    def _text_of(self, tokens: list[int]) -> str:
        """Return the text that gives these tokens. Raises `EmbeddingMismatchError` if there is none."""
        text = str(
            self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        if self._expander.tokens_of(text) != list(tokens):
            raise EmbeddingMismatchError("vLLM expands the placeholder to tokens that no text stands for")
        return text

    def _grid(self, pixels: Any) -> tuple[int, int, int] | None:
        if not self._architecture.has_grid:
            return None
        time, height, width = pixels["image_grid_thw"].data.tolist()
        return time, height, width


def _nbytes(pixels: Any) -> int:
    return sum(part.data.nbytes for part in pixels.values() if isinstance(part.data, torch.Tensor))
