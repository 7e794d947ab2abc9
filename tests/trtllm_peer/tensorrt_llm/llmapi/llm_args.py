"""`tensorrt_llm/llmapi/llm_args.py`, 1.3: names of `TorchLlmArgs` and of the parts that the adapter sets."""

from __future__ import annotations

from typing import Any

_NAMES = frozenset(
    (
        "model",
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "trust_remote_code",
        "tensor_parallel_size",
        "dtype",
        "revision",
        "tokenizer_revision",
        "pipeline_parallel_size",
        "context_parallel_size",
        "gpus_per_node",
        "moe_expert_parallel_size",
        "moe_tensor_parallel_size",
        "enable_attention_dp",
        "kv_cache_config",
        "enable_chunked_prefill",
        "guided_decoding_backend",
        "peft_cache_config",
        "scheduler_config",
        "cache_transceiver_config",
        "speculative_config",
        "max_batch_size",
        "max_input_len",
        "max_seq_len",
        "max_beam_width",
        "max_num_tokens",
        "gather_generation_logits",
        "num_postprocess_workers",
        "garbage_collection",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "moe_config",
        "attn_backend",
        "sampler_type",
        "print_iter_log",
        "load_format",
        "stream_interval",
        "allreduce_strategy",
        "model_kwargs",
        "multimodal_config",
        "encoder_max_batch_size",
        "encoder_max_num_tokens",
        "backend",
    )
)
_PARTS = {
    "kv_cache_config": "enable_block_reuse max_tokens free_gpu_memory_fraction host_cache_size dtype "
    "event_buffer_max_size",
    "cuda_graph_config": "batch_sizes max_batch_size enable_padding",
    "moe_config": "backend max_num_tokens load_balancer",
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what the real classes do not know, with their words."""
    for name, value in arguments.items():
        if name not in _NAMES:
            raise ValueError(f"LLM got invalid argument: {name}")
        known = _PARTS.get(name, "").split()
        unknown = set(value) - set(known) if isinstance(value, dict) else set()
        if unknown:
            raise ValueError(f"{name}: Extra inputs are not permitted: {sorted(unknown)}")
