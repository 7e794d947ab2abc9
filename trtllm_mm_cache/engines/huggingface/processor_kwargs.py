"""What a request may ask of the image processor (`mm_processor_kwargs`), checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import ProcessorMixin

from trtllm_mm_cache.errors import InvalidRequestError

_Count = Annotated[int, Field(ge=1)]


class RequestImageKwargs(BaseModel):
    """The arguments that can sensibly differ between requests; no type is converted into another.

    The processors' other arguments are fixed by the weights (patch and tile sizes, normalisation) or
    are plumbing (devices, tensor types); setting them could only break or slow down the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min_pixels: _Count | None = None
    max_pixels: _Count | None = None
    size: dict[Literal["shortest_edge", "longest_edge"], _Count] | None = None
    do_image_splitting: bool | None = None
    crop_to_patches: bool | None = None
    min_patches: _Count | None = None
    max_patches: _Count | None = None
    do_pan_and_scan: bool | None = None
    pan_and_scan_min_crop_size: _Count | None = None
    pan_and_scan_max_num_crops: _Count | None = None
    pan_and_scan_min_ratio_to_activate: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None


_BOUNDED_BY_MODEL = ("max_patches", "pan_and_scan_max_num_crops")


def configured_bounds(processor: ProcessorMixin) -> dict[str, Any]:
    """Return the size and counts of a request that asks for nothing: the most that others may ask for.

    The model's preprocessor_config.json comes before the defaults of its processor class.
    """
    defaults = getattr(processor, "images_kwargs", {})
    image_processor = processor.image_processor
    size = {edge: pixels for edge, pixels in dict(image_processor.size).items() if pixels is not None}
    counts = {
        name: getattr(image_processor, name, None) or defaults.get(name, 1) for name in _BOUNDED_BY_MODEL
    }
    return {"size": size, **counts}


def image_kwargs(
    requested: Mapping[str, Any], allowed: tuple[str, ...], bounds: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `requested` as arguments of the image processor; `allowed` names those the architecture has.

    No request may cost more than the model's own configuration lets every request cost: sizes, tile
    and crop counts are bounded by the configured ones. Qwen's `min_pixels` and `max_pixels` become
    edges of `size`, as transformers 5 calls them.
    Raises `InvalidRequestError` that names the field.
    """
    unknown = sorted(set(requested) - set(allowed))
    if unknown:
        offered = ", ".join(allowed) or "no argument"
        raise InvalidRequestError(
            f"mm_processor_kwargs.{unknown[0]} cannot be set; this model takes {offered}"
        )
    try:
        checked = RequestImageKwargs.model_validate(dict(requested))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise InvalidRequestError(f"mm_processor_kwargs.{field}: {first['msg']}") from None
    kwargs = checked.model_dump(exclude_none=True)
    for name in _BOUNDED_BY_MODEL:
        _check_bound(name, kwargs.get(name, 1), bounds[name])
    if kwargs.get("min_patches", 1) > kwargs.get("max_patches", bounds["max_patches"]):
        raise InvalidRequestError("mm_processor_kwargs.min_patches is larger than max_patches")
    return _with_sizes(kwargs, bounds["size"])


def _with_sizes(kwargs: dict[str, Any], configured: Mapping[str, int]) -> dict[str, Any]:
    """Fold pixel limits into `size` and complete it from the configured one."""
    edges = dict(kwargs.pop("size", {}))
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if name in kwargs:
            edges[edge] = kwargs.pop(name)
    if not edges:
        return kwargs
    for name, value in edges.items():
        if name not in configured:
            raise InvalidRequestError(f"mm_processor_kwargs.size.{name}: this model has no such edge")
        _check_bound(f"size.{name}", value, configured["longest_edge"])
    size = {**configured, **edges}
    if size.get("shortest_edge", 0) > size["longest_edge"]:
        raise InvalidRequestError("mm_processor_kwargs: the smallest size is larger than the largest")
    return kwargs | {"size": size}


def _check_bound(name: str, value: int, bound: int) -> None:
    if value > bound:
        raise InvalidRequestError(f"mm_processor_kwargs.{name} is {value}; this model allows at most {bound}")
