"""The encode side: images to embeddings with the model's vision tower."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import EncodedItem, EncodeItem
from trtllm_mm_cache.engines.huggingface.model_files import first_line, load_processor, read_config
from trtllm_mm_cache.engines.transformers.loading import fingerprint_of, load_vision_half
from trtllm_mm_cache.engines.transformers.preprocess import ImagePreprocessor, ProcessedImage
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.errors import ConfigurationError, EncodeFailedError, MmCacheError

logger = logging.getLogger(__name__)


class TransformersVisionEncoder:
    """`VisionEncoder` over Hugging Face's own vision tower; the language model is never loaded.

    An embedding's metadata has its placeholder's text, and its grid where the architecture has grids.

    The last bits of a feature depend on what shares its batch, its thread count and its processor;
    a comparison to the last bit needs batches of one.
    """

    def __init__(self, model_path: Path, args: TransformersEngineArgs) -> None:
        """Load the vision half. Blocking. Raises `ConfigurationError`."""
        config, self._architecture = read_config(model_path)
        self._fingerprint = fingerprint_of(model_path, args)
        backend = args.image_processor
        processor = load_processor(model_path, config, backend=backend)
        device = args.resolved_device() if backend == "torchvision" else None
        self._preprocess = ImagePreprocessor(processor, config, self._architecture, device)
        self._model: Any = load_vision_half(model_path, config, self._architecture, args)
        self._device = args.resolved_device()
        self._embedding_dtype = args.resolved_embedding_dtype()
        self._input_names = frozenset(inspect.signature(self._model.get_image_features).parameters)
        self._encode_one()

    @property
    def fingerprint(self) -> str:
        """See `VisionEncoder.fingerprint`."""
        return self._fingerprint

    def preprocess(self, item: EncodeItem) -> ProcessedImage:
        """See `VisionEncoder.preprocess`."""
        return self._preprocess(item)

    def prepared_bytes(self, prepared: ProcessedImage) -> int:
        """See `VisionEncoder.prepared_bytes`."""
        return sum(tensor.nbytes for tensor in prepared.inputs.values())

    def encode(self, batch: Sequence[ProcessedImage]) -> list[EncodedItem | MmCacheError]:
        """Run the tower; see `VisionEncoder.encode`.

        Images whose inputs have the same shape share one run. A run that fails is repeated image by
        image, so that only those at fault get an error.
        """
        tensors: dict[int, torch.Tensor | None] = {}
        for group in self._groups(batch):
            tensors.update(zip(group, self._run_or_log([batch[index] for index in group]), strict=True))
        return [self._result(image, tensors[index]) for index, image in enumerate(batch)]

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _encode_one(self) -> None:
        """Encode a grey image, so that files that do not fit each other fail the start, not requests.

        It also makes the first request as fast as the next.
        """
        try:
            self._run([self._preprocess(EncodeItem(Image.new("RGB", (64, 64), "grey")))])
        except Exception as error:
            raise ConfigurationError(
                f"the model cannot encode a plain image, its files do not fit each other: {first_line(error)}"
            ) from error

    def _result(self, image: ProcessedImage, tensor: torch.Tensor | None) -> EncodedItem | MmCacheError:
        if tensor is None:
            return EncodeFailedError("the vision tower failed on this image; see the encode worker's log")
        return EncodedItem(tensor, EmbeddingMetadata(image.grid, image.placeholder))

    def _groups(self, batch: Sequence[ProcessedImage]) -> list[list[int]]:
        """Return indices of `batch` whose inputs can be concatenated along their first dimension."""
        groups: defaultdict[Any, list[int]] = defaultdict(list)
        for index, image in enumerate(batch):
            shapes = tuple((name, tensor.shape[1:]) for name, tensor in sorted(image.inputs.items()))
            groups[shapes].append(index)
        return list(groups.values())

    def _run_or_log(self, images: list[ProcessedImage]) -> list[torch.Tensor | None]:
        """Return one embedding for each image, None where the log says why there is none."""
        try:
            return list(self._run(images))
        except Exception:
            logger.exception("the vision tower failed on a batch of %d images", len(images))
        if len(images) == 1:
            return [None]
        return [tensor for image in images for tensor in self._run_or_log([image])]

    @torch.no_grad()
    def _run(self, images: list[ProcessedImage]) -> list[torch.Tensor]:
        inputs = {
            name: torch.cat([image.inputs[name] for image in images]).to(self._device)
            for name in images[0].inputs
            if name in self._input_names
        }
        output = self._model.get_image_features(**inputs, return_dict=True)
        features = _rows(output.pooler_output)
        levels = [_rows(level) for level in getattr(output, "deepstack_features", None) or ()]
        if levels:
            features = torch.cat([features, *levels], dim=-1)
        rows = [image.rows for image in images]
        if features.shape[0] != sum(rows):
            raise ValueError(f"the tower gave {features.shape[0]} rows, the placeholders have {sum(rows)}")
        # Views of the batch, where the tower has put them: the arena's extents are the only other copy.
        pieces = torch.split(features.to(self._embedding_dtype).contiguous(), rows)
        if features.is_cuda:
            torch.cuda.current_stream(features.device).synchronize()
        return list(pieces)


def _rows(features: Any) -> torch.Tensor:
    """Return `[rows, width]` for features that come as a tensor or as one tensor for each image."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in features])
