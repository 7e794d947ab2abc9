"""Settings of the transformers engine: the keys of its `encode.yaml` and `pd.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trtllm_mm_cache.engines.engine_args import EngineArgs

if TYPE_CHECKING:  # the schema is checked before any process starts, and torch takes a second
    import torch

DtypeName = Literal["float32", "bfloat16", "float16"]


class TransformersEngineArgs(EngineArgs):
    """How to load and run the model.

    `dtype`, `embedding_dtype` and `image_processor` decide an embedding's bytes and are part of the
    fingerprint: they must be the same on the encode and on the PD worker. The rest may differ.
    """

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute. auto: cuda where there is one, else cpu."
    )
    dtype: DtypeName | None = Field(
        default=None,
        description="What to compute in. Default: float32 on the cpu (bfloat16 is many times slower there), "
        "bfloat16 on cuda.",
    )
    embedding_dtype: DtypeName | None = Field(
        default=None,
        description="What embeddings are stored in. Default: the compute dtype, which is exact. "
        "A half type halves the cache's bytes for each image and rounds the features.",
    )
    image_processor: Literal["pil", "torchvision"] = Field(
        default="pil",
        description="What prepares images for the vision tower: `pil` on the CPU, or `torchvision`, which "
        "the encode worker needs to have installed, on the device where it computes. Their pixels differ in "
        "the last bits, so that each has embeddings of its own.",
    )
    torch_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of one operator on the cpu, for the whole process. Default: torch's choice.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt with its answer, in tokens. Default and upper bound: the model's own.",
    )

    def resolved_device(self) -> torch.device:
        """Return the device that `device` means on this machine."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def resolved_dtype(self) -> torch.dtype:
        """Return the dtype to compute in."""
        default = "float32" if self.resolved_device().type == "cpu" else "bfloat16"
        return torch_dtype(self.dtype or default)

    def resolved_embedding_dtype(self) -> torch.dtype:
        """Return the dtype that embeddings are stored in."""
        return torch_dtype(self.embedding_dtype) if self.embedding_dtype else self.resolved_dtype()


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called `name`, as in `DtypeName`."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without the module: `float32`."""
    return str(dtype).removeprefix("torch.")
