"""Settings of the TensorRT-LLM engine: the keys of its `encode.yaml` and `pd.yaml`.

The names and meanings are those of `tensorrt_llm.llmapi` (1.3; `TorchLlmArgs` for both, since
`MultimodalEncoder` takes the same arguments). Only what is given is passed on, so that the engine's
own defaults hold. A key that is not listed here is refused before the engine is loaded, with the
file's name; that includes typing errors, which the engine itself reports without it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Args(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def given(self) -> dict[str, Any]:
        """Return the arguments to pass to the engine: those that were given, as plain values.

        `backend` stays here: it is checked, and it is the classes' own default in every release.
        """
        return self.model_dump(exclude_unset=True, exclude={"backend"})


class KvCacheConfig(_Args):
    """`kv_cache_config`: how much GPU memory the KV cache takes and whether its blocks are shared."""

    enable_block_reuse: bool = Field(True, description="Share KV blocks of equal prefixes among requests.")
    free_gpu_memory_fraction: float = Field(0.9, gt=0, lt=1, description="Share of free GPU memory to take.")
    max_tokens: int | None = Field(None, gt=0, description="Upper bound in tokens.")
    dtype: str = Field("auto", description="dtype of the KV cache.")
    host_cache_size: int | None = Field(None, ge=0, description="Host memory for evicted blocks, in bytes.")


class CudaGraphConfig(_Args):
    """`cuda_graph_config`: CUDA graphs for decoding."""

    enable_padding: bool = Field(False, description="Round batch sizes up to captured ones.")
    max_batch_size: int | None = Field(None, gt=0, description="Largest batch to capture.")
    batch_sizes: list[int] | None = Field(None, description="Batch sizes to capture.")


class MoeConfig(_Args):
    """`moe_config`: how mixture-of-experts layers run."""

    backend: str = Field("CUTLASS", description="Kernels; DEEPGEMM for FP8 blocks on Blackwell GPUs.")
    max_num_tokens: int | None = Field(None, gt=0, description="Most tokens in one call of the kernels.")


class _CommonArgs(_Args):
    backend: Literal["pytorch"] = Field("pytorch", description="The only backend that serves E/PD.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: str = Field("auto", description="dtype to compute in.")
    max_batch_size: int | None = Field(None, gt=0, description="Most sequences, or images, in one step.")
    max_num_tokens: int | None = Field(None, gt=0, description="Most tokens in one step.")


class TrtllmEncoderArgs(_CommonArgs):
    """Arguments of `MultimodalEncoder`, the encode worker's engine."""

    encoder_max_batch_size: int | None = Field(None, gt=0, description="Most images in one batch.")
    encoder_max_num_tokens: int | None = Field(None, gt=0, description="Most vision tokens in one batch.")


class TrtllmLlmArgs(_CommonArgs):
    """Arguments of `LLM`, the PD worker's engine."""

    max_seq_len: int | None = Field(None, gt=0, description="Longest prompt with its answer, in tokens.")
    pipeline_parallel_size: int = Field(1, ge=1, description="GPUs in a pipeline of layers.")
    moe_expert_parallel_size: int | None = Field(None, ge=1, description="GPUs that share the experts.")
    enable_chunked_prefill: bool = Field(False, description="Split long prefills over steps.")
    disable_overlap_scheduler: bool = Field(False, description="Do not overlap scheduling with compute.")
    kv_cache_config: KvCacheConfig | None = Field(None, description="The KV cache.")
    cuda_graph_config: CudaGraphConfig | None = Field(None, description="CUDA graphs.")
    moe_config: MoeConfig | None = Field(None, description="Kernels of mixture-of-experts layers.")
