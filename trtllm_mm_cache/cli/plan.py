"""`trtllm-mm-cache plan`: how much memory a working set takes, and the flags that give it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm_mm_cache.cache.arena.extents import aligned
from trtllm_mm_cache.engines.base import EmbeddingShape
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.errors import ConfigurationError, RequestError
from trtllm_mm_cache.settings import GB, MB, EncodeSettings, ImageLimits, PdSettings, PlanSettings, Settings
from trtllm_mm_cache.tiers.disk_index import blocks
from trtllm_mm_cache.tiers.format import HEADER_BYTES

_FULL = 0.98
"""How full a cache of mixed sizes is at its emptiest once it evicts (benchmarks/RESULTS.md)."""

_BOOKKEEPING_BYTES = 910  # in the PD worker's own memory, an entry (benchmarks/RESULTS.md)
_BISECTIONS = 20  # a millionth of the lookups
_BATCHES_IN_FLIGHT = 4  # on an encode worker: in the tower, in READs by PD workers, and room to spare


@dataclass(frozen=True)
class Plan:
    """What the cache needs. All sizes in bytes; `entries` is how many embeddings are to fit."""

    settings: PlanSettings
    shape: EmbeddingShape
    entries: int

    @property
    def working_set_bytes(self) -> int:
        """What `entries` embeddings take of an arena, alignment included."""
        return self.entries * aligned(self.shape.nbytes)

    @property
    def capacity_gb(self) -> float:
        """The PD worker's capacity: the working set, and room for the holes between entries."""
        return _round_up(self.working_set_bytes / _FULL / GB)

    @property
    def transfer_arena_mb(self) -> float | None:
        """The PD worker's transit arena where the default would not hold two embeddings, else None."""
        needed = 2 * aligned(self.shape.nbytes) / MB
        return None if needed <= _default(PdSettings, "transfer_arena_mb") else math.ceil(needed)

    @property
    def encode_gb(self) -> float:
        """An encode worker's arena that holds what is encoded and not yet READ; the default at least."""
        images = _BATCHES_IN_FLIGHT * _default(EncodeSettings, "max_batch_images")
        default = _default(EncodeSettings, "multimodal_embedding_cache_capacity_gb")
        return max(default, _round_up(images * aligned(self.shape.nbytes) / GB))

    def text(self) -> str:
        """Return the plan for a reader."""
        settings, shape, transit = self.settings, self.shape, self.transfer_arena_mb
        dtype = str(shape.dtype).removeprefix("torch.")
        shared = self.capacity_gb * GB + (transit or _default(PdSettings, "transfer_arena_mb")) * MB
        lines = [
            f"An image of {settings.size}: {shape.rows:,} rows x {shape.width:,} of {dtype} = "
            f"{shape.nbytes:,} bytes ({shape.nbytes / MB:.2f} MB)",
            self._what_fits(),
            f"Bookkeeping: {self.entries * _BOOKKEEPING_BYTES / MB:.1f} MB of the PD worker's own memory",
            "",
            "PD worker (committed in full at start):",
            f"  --multimodal-embedding-cache-capacity-gb {self.capacity_gb:g}",
            *([f"  --transfer-arena-mb {transit:g}"] if transit else []),
            f"  needs {shared / GB:.2f} GB of /dev/shm (in a container: --shm-size)",
            "Each encode worker:",
            f"  --multimodal-embedding-cache-capacity-gb {self.encode_gb:g}",
            f"  or its share of {max(self.encode_gb, self.capacity_gb):g}: then a restarted PD worker fills "
            "its cache without new encodes",
        ]
        if settings.disk_gb is not None:
            lines += ["", *self._disk(settings.disk_gb)]
        return "\n".join(lines)

    @property
    def disk_entries(self) -> int:
        """How many embeddings the disk of `settings.disk_gb` holds."""
        return int((self.settings.disk_gb or 0) * GB // blocks(HEADER_BYTES + self.shape.nbytes))

    def _disk(self, disk_gb: float) -> list[str]:
        """Say what a disk tier of this size brings: what memory misses and it has is not encoded."""
        settings, entries = self.settings, self.disk_entries
        in_memory = lru_hit_ratio(settings.images, settings.zipf, self.entries)
        # What lies in memory lies on disk too, so the disk alone decides what must be encoded.
        on_either = lru_hit_ratio(settings.images, settings.zipf, max(entries, self.entries))
        return [
            "Disk tier:",
            "  --multimodal-embedding-cache-disk-path FOLDER",
            f"  --multimodal-embedding-cache-disk-capacity-gb {disk_gb:g}",
            f"  holds {min(entries, settings.images):,} of {settings.images:,} images: of lookups as above "
            f"{100 * (1 - in_memory):.1f} % miss the memory, and {100 * (1 - on_either):.1f} % are encoded; "
            "after a restart none is that lies there",
        ]

    def _what_fits(self) -> str:
        total = f"{self.working_set_bytes / GB:.3f} GB"
        if self.settings.hit is None:
            return f"{self.entries:,} images: {total}"
        return (
            f"{self.entries:,} of {self.settings.images:,} images: {total}; an LRU cache of that size hits "
            f"{100 * self.settings.hit:g} % of lookups whose popularity follows Zipf's law with exponent "
            f"{self.settings.zipf:g}"
        )


def make_plan(settings: PlanSettings) -> Plan:
    """Count an image's tokens with the model's own processor and add up. Blocking: seconds.

    Raises `ConfigurationError` for a model that the engine does not serve, for kwargs or a size that its
    processor refuses, and when the engine `transformers`, which counts for both, is not installed.
    """
    kwargs = _kwargs(settings)
    width, height = (int(side) for side in settings.size.split("x"))
    limits = ImageLimits()
    if width * height > limits.max_pixels:
        raise ConfigurationError(
            f"--size {settings.size} is more than the {limits.max_image_megapixels:g} megapixels "
            "that workers let in"
        )
    model = settings.model_path
    if not model.is_dir():
        raise ConfigurationError(
            f"--model-path {model} is not a directory; a model's configuration alone can be had with: "
            "hf download NAME --exclude '*.safetensors' --local-dir DIR"
        )
    dtype = load_engine(settings.engine).embedding_dtype(model, settings.extra_engine_args)
    load_engine("transformers")
    from trtllm_mm_cache.engines.transformers import embedding_shape

    try:
        # A few models encode an image otherwise where it is not alone in its prompt, and never larger.
        shape = embedding_shape(model, (width, height), kwargs, images_in_prompt=1, dtype=dtype)
    except RequestError as error:
        raise ConfigurationError(f"no such image can be served: {error.message}") from error
    entries = settings.images
    if settings.hit is not None:
        entries = lru_entries(settings.images, settings.zipf, settings.hit)
    return Plan(settings, shape, entries)


def lru_entries(objects: int, exponent: float, hit_ratio: float) -> int:
    """Return how many of `objects` equally large ones an LRU cache must hold to hit `hit_ratio` of lookups.

    Lookups are independent, popularity follows Zipf's law. Che's approximation (Che, Tung, Wang, IEEE JSAC
    2002): an object is in the cache when it was asked for within the last `age` lookups, one age for all.
    """
    popularity = np.arange(1, objects + 1, dtype=np.float64) ** -exponent
    popularity /= popularity.sum()

    def present(age: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        return -np.expm1(-popularity * age)

    young, old = 0.0, 1.0
    while popularity @ present(old) < hit_ratio:
        old *= 2
    while old - young > 1e-6 * old:
        age = (young + old) / 2
        young, old = (age, old) if popularity @ present(age) < hit_ratio else (young, age)
    return min(objects, math.ceil(float(present(old).sum())))


def lru_hit_ratio(objects: int, exponent: float, entries: int) -> float:
    """Return the share of lookups that an LRU cache of `entries` entries hits: `lru_entries` inverted."""
    if entries >= objects:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if lru_entries(objects, exponent, middle) <= entries else (low, middle)
    return low


def _kwargs(settings: PlanSettings) -> Mapping[str, Any]:
    try:
        kwargs = json.loads(settings.processor_kwargs)
    except ValueError as error:
        raise ConfigurationError(f"--processor-kwargs is not JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise ConfigurationError("--processor-kwargs must be a JSON object, as in '{\"max_pixels\": 501760}'")
    if kwargs and settings.engine == "trtllm":
        raise ConfigurationError("--processor-kwargs: with TensorRT-LLM the model's own settings hold")
    return kwargs


def _default(role: type[Settings], field: str) -> float:
    default: float = role.model_fields[field].default
    return default


def _round_up(gb: float) -> float:
    step = 100 if gb >= 1 else 1000
    return math.ceil(gb * step) / step
