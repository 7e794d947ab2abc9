"""A prompt as SGLang's scheduler takes it from SGLang's own processors: tokens, and items that lie in them.

No processor of SGLang's runs, and it gets no pixels. Each image is an item of its own, with the runs of its
tokens, its embedding, and its grid where positions are computed from one.

SGLang's identity of an image is made from 32 bytes (`MultimodalDataItem.set_identity`, 0.5.23): its tokens
become four numbers of 62 bits in turn, by which the prefix cache knows it. We give it our key, so equal there
means equal content, kwargs, fingerprint and salt. Left alone SGLang takes 64 bits of a SHA-256 over the
embedding's bytes, which it would have to read for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trtllm_mm_cache.engines.base import LeasedEmbedding
from trtllm_mm_cache.engines.huggingface.expanded import ExpandedPrompt
from trtllm_mm_cache.engines.sglang.handed_over import hand_over


class EngineInputs:
    """Stands where SGLang's tokenizer manager has its processor, and hands on what is prepared already.

    A request's `image_data` is `[MultimodalProcessorOutput]`. Everything else is the processor's own.
    """

    prefer_tokenized_input = True
    generates_input_ids_from_raw_prompt = False

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    async def process_mm_data_async(self, image_data: Sequence[Any], **others: Any) -> Any:
        """Return the request's prepared input."""
        del others
        (prepared,) = image_data
        return prepared

    def engine_input(
        self, prompt: ExpandedPrompt, leases: Sequence[LeasedEmbedding], image_token_id: int
    ) -> Any:
        """Return the `MultimodalProcessorOutput` of a prompt with images. Thread-safe; copies nothing."""
        from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

        grids = prompt.grids or [None] * len(leases)
        items = [
            _item(lease, runs, grid) for lease, runs, grid in zip(leases, prompt.images, grids, strict=True)
        ]
        positions = delta = None
        if prompt.grids is not None:
            positions, delta = self.processor.compute_mrope_positions(prompt.token_ids, items)
        return MultimodalProcessorOutput(
            mm_items=items,
            input_ids=prompt.token_ids,
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(prompt.token_ids, items),
            im_token_id=image_token_id,
            mrope_positions=positions,
            mrope_position_delta=delta,
        )


def _item(lease: LeasedEmbedding, runs: Sequence[tuple[int, int]], grid: Sequence[int] | None) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    item = MultimodalDataItem(
        modality=Modality.IMAGE,
        offsets=list(runs),
        precomputed_embeddings=hand_over(lease.handle()),
        model_specific_data={} if grid is None else {"image_grid_thw": torch.tensor([list(grid)])},
    )
    item.set_identity(bytes.fromhex(lease.key))
    return item
