"""Settings of the vLLM engine: the keys of its `pd.yaml`, named as in vLLM's `AsyncEngineArgs` (0.32).

Only what is given is passed on, so that vLLM's own defaults hold. What this project must decide itself is
not a key: `FORCED` says why. A key that is not listed is refused before vLLM is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from trtllm_mm_cache.engines.foreign_tower import ForeignTowerArgs

FORCED: Final[Mapping[str, str]] = {
    "model": "it is --model-path",
    "tokenizer": "it is the model's own",
    "ec_transfer_config": "embeddings reach vLLM by this project's own connector",
    "worker_extension_cls": "it holds this project's wait for loads of embeddings",
    "mm_processor_cache_gb": "it is 0: the PD worker's cache is the cache, and vLLM's would ask for images "
    "that it never sees",
    "mm_encoder_only": "a PD worker runs the language model",
    "language_model_only": "vLLM would refuse prompts with images",
    "enable_mm_embeds": "embeddings come by handle, not in requests",
    "limit_mm_per_prompt": "it is --max-images-per-request, and 0 leaves out a tower that would never run",
    "skip_mm_profiling": "it follows from who runs the vision tower",
    "max_logprobs": "it is 20, as in OpenAI's API",
    "logprobs_mode": "log probabilities are the model's own, whatever the engine",
    "model_impl": "only vLLM's own models take embeddings by handle",
    "generation_config": "what a request leaves open is the API's to say",
    "enable_log_requests": "a request's text is not for the log",
    "enable_lora": "it follows from lora_modules",
    "max_cpu_loras": "there is room for all adapters: one that could not be read again in the middle of a "
    "step would end the engine",
    "enable_tower_connector_lora": "all adapters share the embeddings of one tower",
    "default_mm_loras": "a request names its adapter, as its model",
    "structured_outputs_config": "it is guidance, which bounds what a schema may cost",
}
"""Keys of vLLM that are not an operator's to set, with the reason."""


AdapterName = Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]
"""A model's name for clients, in URLs too."""


class VllmEngineArgs(ForeignTowerArgs):
    """How vLLM loads and runs the model, and whose embeddings it takes."""

    forced: ClassVar = FORCED

    tensor_parallel_size: int = Field(1, ge=1, description="Workers that share each layer.")
    pipeline_parallel_size: int = Field(1, ge=1, description="Workers in a pipeline of layers.")
    enable_expert_parallel: bool = Field(False, description="Spread experts over the workers.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt with its answer, in tokens. Default: the model's own."
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Most answers that decode together.")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens in one step; also the most rows that one image may have, and all images "
        "that vLLM holds at a time.",
    )
    enable_chunked_prefill: bool | None = Field(None, description="Split long prefills over steps.")
    enable_prefix_caching: bool | None = Field(
        None, description="Share keys and values among prompts with equal beginnings. vLLM's default is on."
    )
    block_size: int | None = Field(None, ge=1, description="Tokens in one block of the KV cache.")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of the GPU's memory that vLLM may take."
    )
    kv_cache_memory_bytes: int | None = Field(None, ge=1, description="Size of the KV cache in bytes.")
    num_gpu_blocks_override: int | None = Field(
        None, ge=1, description="Blocks of the KV cache, whatever memory there is."
    )
    kv_cache_dtype: str | None = Field(None, description="What keys and values are stored in.")
    quantization: str | None = Field(None, description="How the weights are quantised.")
    enforce_eager: bool = Field(False, description="Neither compile the model nor capture CUDA graphs.")
    compilation_config: dict[str, Any] | None = Field(None, description="How the model is compiled.")
    disable_custom_all_reduce: bool = Field(False, description="Reduce by NCCL alone.")
    distributed_executor_backend: Literal["mp", "uni"] | None = Field(
        None, description="How vLLM starts its workers. They must be on this machine: the arena is."
    )
    async_scheduling: bool | None = Field(None, description="Schedule the next step while one computes.")
    lora_modules: dict[AdapterName, Path] = Field(
        {},
        description="LoRA adapters of the language model that requests may name as their model: by name, the "
        "folder of each, as PEFT saves it. They are loaded at start.",
    )
    max_loras: int | None = Field(
        None,
        ge=1,
        description="Most adapters in one step; requests with others wait. vLLM's default is 1; on a CPU "
        "there is no wait.",
    )
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = Field(
        None, description="Highest rank of an adapter. vLLM's default is 16."
    )
    seed: int = Field(0, description="Seed of what requests without one draw.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    load_format: str | None = Field(None, description="How the weights are stored.")

    def given(self) -> dict[str, Any]:
        """See `ForeignTowerArgs.given`; the adapters themselves are loaded when the engine runs."""
        arguments = super().given()
        arguments.pop("lora_modules", None)
        most = max(len(self.lora_modules) + 1, self.max_loras or 1)
        return arguments | ({"enable_lora": True, "max_cpu_loras": most} if self.lora_modules else {})
