"""The encode side: images to embeddings with TensorRT-LLM's `MultimodalEncoder`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.fingerprint import model_fingerprint
from trtllm_mm_cache.engines.trtllm.layout import ModelLayout, embedding_dtype_name
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs
from trtllm_mm_cache.engines.trtllm.support import (
    architecture_of,
    import_tensorrt_llm,
    require_separate_worker,
    shut_down_on_failure,
    start_engine,
)
from trtllm_mm_cache.errors import (
    ConfigurationError,
    EncodeFailedError,
    InvalidRequestError,
    MmCacheError,
)

logger = logging.getLogger(__name__)


class TrtllmVisionEncoder:
    """`VisionEncoder` over `MultimodalEncoder`, which preprocesses and encodes; no language model is loaded.

    An embedding's tensor is a view of the engine process's own memory (CUDA IPC on a GPU): the caller
    copies it once, straight to where it belongs, and drops it, upon which the engine frees it.
    Its metadata has the grid, `[1, h, w]` in patches, where the architecture has grids.
    """

    def __init__(self, model_path: Path, args: TrtllmEncoderArgs) -> None:
        """Load the vision half. Blocking: minutes. Raises `ConfigurationError`."""
        self._architecture = architecture_of(model_path)
        require_separate_worker()
        tensorrt_llm = import_tensorrt_llm()
        from tensorrt_llm._torch.shared_tensor import SharedTensorContainer

        self._container = SharedTensorContainer
        self._encoder: Any = start_engine(tensorrt_llm.MultimodalEncoder, model_path, args.given())
        with shut_down_on_failure(self._encoder):
            config = self._encoder.input_processor.config
            self._layout = ModelLayout.of(config)
            self._fingerprint = model_fingerprint(
                model_path,
                engine=f"tensorrt_llm {tensorrt_llm.__version__}",
                embedding_dtype=embedding_dtype_name(config, args.dtype),
            )
            self._encode_one()

    @property
    def fingerprint(self) -> str:
        """See `VisionEncoder.fingerprint`."""
        return self._fingerprint

    def preprocess(self, item: EncodeItem) -> Image.Image:
        """Return the image: the engine's own input processor does the rest, in its `generate`.

        Raises `InvalidRequestError` for any `processor_kwargs`: the engine counts an image's tokens from the
        model's own settings, whatever the request says.
        """
        if item.processor_kwargs:
            name = min(item.processor_kwargs)
            raise InvalidRequestError(
                f"mm_processor_kwargs.{name} cannot be set; with TensorRT-LLM the model's own settings hold"
            )
        return item.image.convert("RGB")

    def prepared_bytes(self, prepared: Image.Image) -> int:
        """See `VisionEncoder.prepared_bytes`: three bytes a pixel."""
        return 3 * prepared.width * prepared.height

    def encode(self, batch: Sequence[Image.Image]) -> list[EncodedItem | MmCacheError]:
        """Run the tower; see `VisionEncoder.encode`. A batch that fails is repeated image by image."""
        try:
            return list(self._run(batch))
        except Exception:
            logger.exception("the vision tower failed on a batch of %d images", len(batch))
        if len(batch) > 1:
            return [result for image in batch for result in self.encode([image])]
        return [EncodeFailedError("the vision tower failed on this image; see the encode worker's log")]

    def close(self) -> None:
        """Free the model."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.shutdown()

    def _encode_one(self) -> None:
        """Encode a grey image, so that files that do not fit each other fail the start, not requests."""
        try:
            self._run([Image.new("RGB", (64, 64), "grey")])
        except Exception as error:
            raise ConfigurationError(
                f"the model cannot encode a plain image, its files do not fit each other: {error}"
            ) from error

    def _run(self, images: Sequence[Image.Image]) -> list[EncodedItem]:
        outputs = self._encoder.generate(
            [
                {"prompt": self._architecture.encoder_prompt, "multi_modal_data": {"image": [image]}}
                for image in images
            ],
            use_tqdm=False,
        )
        if len(outputs) != len(images):
            raise ValueError(f"the engine gave {len(outputs)} results for {len(images)} images")
        return [self._encoded(output.disaggregated_params) for output in outputs]

    def _encoded(self, params: Any) -> EncodedItem:
        handles = getattr(params, "multimodal_embedding_handles", None) or ()
        if isinstance(handles, tuple) and handles:
            # Releases up to 1.2 wrap the list in a tuple in one of their branches.
            handles = handles[0]
        if len(handles) != 1:
            raise ValueError(f"the engine gave {len(handles)} embedding handles for one image")
        tensor = self._open(handles[0])
        if tensor.dim() != 2 or tensor.shape[1] != self._layout.width:
            raise ValueError(
                f"the engine gave {list(tensor.shape)}, this model's are [rows, {self._layout.width}]"
            )
        return EncodedItem(tensor, self._metadata(params, tensor.shape[0]))

    def _metadata(self, params: Any, rows: int) -> EmbeddingMetadata:
        if not self._architecture.has_mrope:
            return EmbeddingMetadata()
        handles = (
            getattr(params, "mrope_position_ids_handle", None),
            getattr(params, "mrope_position_deltas_handle", None),
        )
        if None in handles:
            raise ValueError("the engine gave no positions with the embedding")
        # The deltas are of no use here, but what is never opened the engine can never free.
        position_ids, _ = [self._open(handle) for handle in handles]
        grid = self._layout.grid_from_positions(position_ids, rows)
        if grid is None:
            raise ValueError(f"the engine's positions do not describe an image of {rows} rows")
        return EmbeddingMetadata(grid)

    def _open(self, handle: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._container.from_dict(handle).get_local_view()
        return tensor
