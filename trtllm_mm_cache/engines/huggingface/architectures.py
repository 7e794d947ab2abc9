"""The architectures that this engine serves, and what sets each apart.

Whether an image's features depend on the prompt around it, as read from each processor and model of
transformers 5.23:

qwen2_vl, qwen2_5_vl, qwen3_vl   no: patches of different images never attend to each other
llava                            no: every image is resized to one square
llava_next                       no: padding to the tile count of its neighbours is cut off again
llava_onevision                  yes: an image alone in its prompt is tiled, several are each padded to
                                 one square (as `apply_chat_template` hands them over)
internvl                         no: tiles are counted for each image
smolvlm, idefics3                no: all tiles have one size, padding to a neighbour's count is dropped
gemma3                           no: crops are cut from the image alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_mm_cache.errors import ConfigurationError


@dataclass(frozen=True)
class Architecture:
    """How the halves of a model are called, and in which form it takes features.

    `vision_modules` and `text_module` are attributes of the base model (`model.model`).
    `features_as_tensor`: its forward wants one tensor for all images instead of one for each.
    `has_grid`: rows are laid out by `image_grid_thw`, from which the decoder computes positions.
    `type_ids_argument`: the forward argument that marks image tokens, or None.
    `request_kwargs`: the image processor's arguments that a request may set.
    `multi_image_variant`: see the table above.
    """

    model_type: str
    vision_modules: tuple[str, ...]
    text_module: str = "language_model"
    features_as_tensor: bool = False
    has_grid: bool = False
    type_ids_argument: str | None = None
    request_kwargs: tuple[str, ...] = ()
    multi_image_variant: bool = False

    def variant(self, image_count: int) -> str:
        """Return "single" or "multi" where a lone image is encoded differently, else ""."""
        if not self.multi_image_variant or image_count == 0:
            return ""
        return SINGLE_IMAGE if image_count == 1 else MULTI_IMAGE


SINGLE_IMAGE = "single"
MULTI_IMAGE = "multi"
"""Variants of an architecture with `multi_image_variant`."""

_TOWER_AND_PROJECTOR = ("vision_tower", "multi_modal_projector")


def _qwen(model_type: str) -> Architecture:
    return Architecture(
        model_type,
        ("visual",),
        has_grid=True,
        type_ids_argument="mm_token_type_ids",
        request_kwargs=("min_pixels", "max_pixels", "size"),
    )


def _idefics(model_type: str) -> Architecture:
    return Architecture(
        model_type,
        ("vision_model", "connector"),
        text_module="text_model",
        features_as_tensor=True,
        request_kwargs=("size", "do_image_splitting"),
    )


_SUPPORTED: Mapping[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        _qwen("qwen2_vl"),
        _qwen("qwen2_5_vl"),
        _qwen("qwen3_vl"),
        Architecture("llava", _TOWER_AND_PROJECTOR),
        Architecture("llava_next", _TOWER_AND_PROJECTOR),
        Architecture("llava_onevision", _TOWER_AND_PROJECTOR, multi_image_variant=True),
        Architecture(
            "internvl",
            _TOWER_AND_PROJECTOR,
            features_as_tensor=True,
            request_kwargs=("crop_to_patches", "min_patches", "max_patches"),
        ),
        _idefics("smolvlm"),
        _idefics("idefics3"),
        Architecture(
            "gemma3",
            _TOWER_AND_PROJECTOR,
            features_as_tensor=True,
            type_ids_argument="token_type_ids",
            request_kwargs=(
                "do_pan_and_scan",
                "pan_and_scan_min_crop_size",
                "pan_and_scan_max_num_crops",
                "pan_and_scan_min_ratio_to_activate",
            ),
        ),
    )
}


def architecture_of(model_type: str) -> Architecture:
    """Return the entry of a config.json's `model_type`.

    Raises `ConfigurationError` that lists the supported ones.
    """
    try:
        return _SUPPORTED[model_type]
    except KeyError:
        supported = ", ".join(sorted(_SUPPORTED))
        raise ConfigurationError(
            f"the transformers engine does not serve the architecture {model_type!r}; it serves {supported}"
        ) from None
