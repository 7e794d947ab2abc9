"""Settings of an engine that takes the embeddings of a tower run by transformers, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from trtllm_mm_cache.engines.engine_args import EngineArgs
from trtllm_mm_cache.engines.fingerprint import transformers_fingerprint
from trtllm_mm_cache.errors import ConfigurationError

DtypeName = Literal["float32", "bfloat16", "float16"]

TOWER_FIELDS: Final = frozenset({"dtype", "encoder_dtype", "encoder_image_processor", "encoder_transformers"})
"""Keys that are this project's own; the others are the engine's."""


class ForeignTowerArgs(EngineArgs):
    """Whose embeddings an engine takes. All of its keys are part of the fingerprint.

    The engine's own keys are a subclass's. `forced` are those that are not an operator's, with the reason.
    """

    forced: ClassVar[Mapping[str, str]] = {}

    dtype: DtypeName | None = Field(
        None,
        description="What to compute in, and what embeddings are stored in: embedding_dtype in encode.yaml "
        "must be the same. Default: the model's own.",
    )
    encoder_dtype: DtypeName = Field(
        "float32",
        description="What the encode worker's tower computes in: its `dtype`, which is float32 on a cpu and "
        "bfloat16 on cuda unless set.",
    )
    encoder_image_processor: Literal["pil", "torchvision"] = Field(
        "pil", description="What prepares images for the encode worker's tower: its `image_processor`."
    )
    encoder_transformers: str | None = Field(
        None,
        description="Release of transformers in the encode worker's environment. Default: the one here.",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_forced(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in cls.forced:
                raise ValueError(f"'{name}' cannot be set: {cls.forced[name]}")
        return values

    def given(self) -> dict[str, Any]:
        """Return the arguments to pass to the engine: those that were given, without those that are ours."""
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude=set(TOWER_FIELDS))

    def resolved_dtype(self, model_path: Path) -> str:
        """Return the name of the dtype to compute in and to store embeddings in.

        An engine's own "auto" may turn float32 into a half type; here it is what the model's files say.
        Raises `ConfigurationError` when they do not say, or say one that embeddings cannot have.
        """
        if self.dtype is not None:
            return self.dtype
        try:
            config = json.loads((model_path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError("the model directory has no readable config.json") from error
        for part in (config.get("text_config"), config):
            for name in ("dtype", "torch_dtype"):
                value = part.get(name) if isinstance(part, dict) else None
                if value in ("float32", "bfloat16", "float16"):
                    return str(value)
        raise ConfigurationError("the model's config.json names no dtype: set dtype in pd.yaml")

    def fingerprint(self, model_path: Path) -> str:
        """Return the fingerprint of the tower whose embeddings are taken. Blocking: reads all weights."""
        release = self.encoder_transformers
        if release is None:
            import transformers

            release = transformers.__version__
        return transformers_fingerprint(
            model_path,
            release=release,
            dtype=self.encoder_dtype,
            embedding_dtype=self.resolved_dtype(model_path),
            images=self.encoder_image_processor,
        )
