"""Options of `trtllm-mm-cache plan`. Apart from the planning, so that `--help` loads nothing else."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trtllm_mm_cache.config import EngineName, Settings


class PlanSettings(Settings):
    """What is to be cached."""

    model: Path = Field(description="Model directory; configuration and tokenizer files are enough.")
    images: int = Field(ge=1, description="Distinct images in the working set.")
    size: str = Field(
        pattern=r"^[1-9]\d*x[1-9]\d*$",
        description="Their size in pixels, as 1024x768.",
        json_schema_extra={"form": "WIDTHxHEIGHT in pixels, as 1024x768"},
    )
    processor_kwargs: str = Field("{}", description="The requests' mm_processor_kwargs, as a JSON object.")
    images_in_prompt: int = Field(
        1, ge=1, description="Images in one request: a few models encode an image otherwise when not alone."
    )
    hit: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Plan for this hit ratio instead of for the whole working set, as in 0.9.",
    )
    zipf: float = Field(
        0.9,
        ge=0,
        le=3,
        description="With --hit: how unequal popularity is, the exponent of Zipf's law. 0: all are equal.",
    )
    encode_workers: int = Field(1, ge=1, description="Encode workers that share the second level.")
    engine: EngineName = Field("transformers", description="Engine of the workers.")
    extra_engine_args: Path | None = Field(
        None, description="The encode worker's engine YAML file: it may name the dtype."
    )
