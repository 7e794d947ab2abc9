"""Settings of the SGLang engine: the keys of its `pd.yaml`, named as in SGLang's `ServerArgs` (0.5.23).

Only what is given is passed on, so that SGLang's own defaults hold. What this project must decide itself is
not a key: `FORCED` says why. A key that is not listed is refused before SGLang is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal

from pydantic import Field

from trtllm_mm_cache.engines.foreign_tower import ForeignTowerArgs

FORCED: Final[Mapping[str, str]] = {
    "model_path": "it is --model-path",
    "tokenizer_path": "it is the model's own",
    "served_model_name": "it is --model-name",
    "host": "the engine runs in this worker and listens nowhere",
    "port": "the engine runs in this worker and listens nowhere",
    "skip_tokenizer_init": "stop strings and structured output need the tokenizer in SGLang's scheduler",
    "tokenizer_worker_num": "requests go to the scheduler from this worker alone",
    "nnodes": "the schedulers map this worker's arena, so they must be on this machine",
    "dp_size": "start one PD worker for each replica: each then has its own cache",
    "enable_multimodal": "it is true",
    "language_only": "embeddings would have to come from SGLang's own encoders",
    "language_model_only": "SGLang would refuse prompts with images",
    "encoder_only": "a PD worker runs the language model",
    "disaggregation_mode": "prefill and decode are one worker here",
    "enable_mm_global_cache": "the PD worker's cache is the cache",
    "limit_mm_data_per_request": "it is --max-images-per-request",
    "enable_broadcast_mm_inputs_process": "each scheduler maps the arena itself; a broadcast would copy "
    "embeddings",
    "incremental_streaming_output": "it is true: tokens are handed on as they come",
    "stream_interval": "it is 1: tokens are handed on as they come",
    "grammar_backend": "it is llguidance, which bounds what a schema may cost",
    "constrained_json_whitespace_pattern": "it bounds blanks, or a model could go on with them for ever",
    "allow_auto_truncate": "a prompt that does not fit is refused, not cut",
    "sampling_defaults": "what a request leaves open is the API's to say",
    "model_impl": "answers were compared with SGLang's own models",
    "log_requests": "a request's text is not for the log",
    "crash_dump_folder": "a request's text is not for a file",
    "custom_sigquit_handler": "this worker watches SGLang's processes itself",
}
"""Keys of SGLang that are not an operator's to set, with the reason."""


class SglangEngineArgs(ForeignTowerArgs):
    """How SGLang loads and runs the model, and whose embeddings it takes."""

    forced: ClassVar = FORCED

    device: Literal["cuda", "cpu"] | None = Field(
        None,
        description="Where to compute. Default: a GPU if there is one, else the CPU, with the backends that "
        "work there.",
    )
    tp_size: int = Field(1, ge=1, description="Schedulers that share each layer.")
    pp_size: int = Field(1, ge=1, description="Schedulers in a pipeline of layers.")
    ep_size: int = Field(1, ge=1, description="Schedulers that experts are spread over.")
    context_length: int | None = Field(
        None, ge=1, description="Longest prompt with its answer, in tokens. Default: the model's own."
    )
    max_running_requests: int | None = Field(None, ge=1, description="Most answers that decode together.")
    max_queued_requests: int | None = Field(None, ge=1, description="Most requests that wait in SGLang.")
    max_total_tokens: int | None = Field(None, ge=1, description="Tokens that the KV cache has room for.")
    max_prefill_tokens: int | None = Field(None, ge=1, description="Most prompt tokens in one step.")
    chunked_prefill_size: int | None = Field(
        None, description="Most tokens of one prompt in one step; -1 computes each prompt at once."
    )
    enable_mixed_chunk: bool = Field(False, description="Put parts of prompts and decoding into one step.")
    mem_fraction_static: float | None = Field(
        None, gt=0, le=1, description="Share of the device's memory for weights and KV cache."
    )
    schedule_policy: str | None = Field(None, description="Which waiting request comes next.")
    schedule_conservativeness: float | None = Field(
        None, gt=0, description="Higher values admit fewer requests, so that fewer are taken back."
    )
    disable_radix_cache: bool = Field(
        False, description="Share no keys and values among prompts with equal beginnings."
    )
    page_size: int | None = Field(None, ge=1, description="Tokens in one page of the KV cache.")
    kv_cache_dtype: str | None = Field(None, description="What keys and values are stored in.")
    quantization: str | None = Field(None, description="How the weights are quantised.")
    load_format: str | None = Field(None, description="How the weights are stored.")
    attention_backend: str | None = Field(None, description="Kernels of attention.")
    sampling_backend: str | None = Field(None, description="Kernels of sampling.")
    mm_attention_backend: str | None = Field(
        None, description="Kernels of the vision tower, which is loaded and not used."
    )
    moe_runner_backend: str | None = Field(None, description="Kernels of experts.")
    disable_cuda_graph: bool | None = Field(None, description="Capture no CUDA graphs.")
    disable_overlap_schedule: bool | None = Field(
        None, description="Do not schedule the next step while one computes."
    )
    disable_custom_all_reduce: bool = Field(False, description="Reduce by NCCL alone.")
    enable_deterministic_inference: bool = Field(
        False,
        description="Compute each request independently of others beside it. Without it requests with a seed "
        "are refused: SGLang would ignore it.",
    )
    enable_torch_compile: bool = Field(False, description="Compile the model.")
    random_seed: int | None = Field(None, description="Seed of what requests without one draw.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    watchdog_timeout: float | None = Field(
        None, gt=0, description="Seconds after which a step that has not ended ends the engine."
    )
