"""Settings of the TensorRT-LLM engine: the keys of its `encode.yaml` and `pd.yaml`.

The names and meanings are those of `tensorrt_llm.llmapi` (1.3; `TorchLlmArgs` for both, since
`MultimodalEncoder` takes the same arguments). Only what is given is passed on, so that the engine's
own defaults hold. A key that is not listed here is refused before the engine is loaded, with the
file's name. What stands inside a mapping is the engine's own to check: it refuses what it does not know.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trtllm_mm_cache.engines.engine_args import EngineArgs


class _CommonArgs(EngineArgs):
    backend: Literal["pytorch"] = Field("pytorch", description="The only backend that serves E/PD.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: str = Field("auto", description="dtype to compute in.")
    max_batch_size: int | None = Field(None, gt=0, description="Most sequences, or images, in one step.")
    max_num_tokens: int | None = Field(None, gt=0, description="Most tokens in one step.")

    def given(self) -> dict[str, Any]:
        """Return the arguments to pass to the engine: those that were given, as plain values.

        `backend` stays here: it is checked, and it is the classes' own default in every release.
        """
        return self.model_dump(exclude_unset=True, exclude={"backend"})


class TrtllmEncoderArgs(_CommonArgs):
    """Arguments of `MultimodalEncoder`, the encode worker's engine."""


class TrtllmLlmArgs(_CommonArgs):
    """Arguments of `LLM`, the PD worker's engine."""

    max_seq_len: int | None = Field(None, gt=0, description="Longest prompt with its answer, in tokens.")
    pipeline_parallel_size: int = Field(1, ge=1, description="GPUs in a pipeline of layers.")
    moe_expert_parallel_size: int | None = Field(None, ge=1, description="GPUs that share the experts.")
    enable_chunked_prefill: bool = Field(False, description="Split long prefills over steps.")
    disable_overlap_scheduler: bool = Field(False, description="Do not overlap scheduling with compute.")
    kv_cache_config: dict[str, Any] | None = Field(
        None, description="The KV cache: its memory, and whether requests share blocks of equal prefixes."
    )
    cuda_graph_config: dict[str, Any] | None = Field(None, description="CUDA graphs for decoding.")
    moe_config: dict[str, Any] | None = Field(None, description="Kernels of mixture-of-experts layers.")

    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = Field(
        None,
        description="What holds answers to a schema or pattern. Default: nothing, such requests are refused.",
    )

    @property
    def enable_block_reuse(self) -> bool:
        """Whether requests share KV blocks of equal prefixes: what is given, else the engine's default."""
        return bool((self.kv_cache_config or {}).get("enable_block_reuse", True))
