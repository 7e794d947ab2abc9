"""`tensorrt_llm/llmapi/llm.py`, 1.3: `LLM`, the order of its preprocessing, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.process import ExecutorProcess
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.inputs import create_input_processor
from tensorrt_llm.llmapi.llm_args import check_arguments
from tensorrt_llm.sampling_params import SamplingParams

_INPUT_KEYS = frozenset(
    (
        "prompt",
        "prompt_token_ids",
        "multi_modal_data",
        "multi_modal_embeddings",
        "mm_processor_kwargs",
        "multi_modal_uuids",
        "mm_item_order",
        "query",
        "query_token_ids",
    )
)


class LLM:
    """Prefill and decode, in a process of its own."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        del (
            tokenizer,
            tokenizer_mode,
            skip_tokenizer_init,
            trust_remote_code,
            dtype,
            revision,
            tokenizer_revision,
        )
        check_arguments(kwargs)
        if tensor_parallel_size != 1:
            raise RuntimeError(f"Only 1 GPUs are available, but {tensor_parallel_size} are required.")
        self._chunked_prefill = kwargs.get("enable_chunked_prefill", False)
        self._max_num_tokens = kwargs.get("max_num_tokens") or 8192
        self._executor: ExecutorProcess | None = ExecutorProcess("language", str(model))
        self.input_processor = create_input_processor(model)
        self._used: list[Any] = []
        self._executor.wait_until_ready()

    @property
    def tokenizer(self) -> Any:
        return self.input_processor.tokenizer

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: Mapping[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        conversation_params: Any = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> RequestOutput:
        """Preprocess here, synchronously, and hand the request to the other process."""
        del lora_request, prompt_adapter_request, kv_cache_retention_config, trace_headers
        del _postproc_params, scheduling_params, conversation_params, priority
        if self._executor is None:
            raise RuntimeError("LLM is shutting down")
        sampling_params = sampling_params or SamplingParams()
        if not isinstance(sampling_params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams, got {type(sampling_params)}")
        if sampling_params.end_id is None:
            sampling_params.setup(self.tokenizer)
        token_ids, multimodal = self._preprocess(inputs, disaggregated_params)
        if not self._chunked_prefill and len(token_ids) > self._max_num_tokens:
            raise RequestError(
                f"The prompt length ({len(token_ids)}) should not exceed max_num_tokens "
                f"({self._max_num_tokens})"
            )
        request = {"token_ids": token_ids, "sampling": sampling_params, "cache_salt": cache_salt}
        return self._executor.submit({**request, "streaming": streaming, **multimodal}, token_ids)

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _preprocess(
        self, inputs: Any, params: DisaggregatedParams | None
    ) -> tuple[list[int], dict[str, Any]]:
        if not isinstance(inputs, dict) or not {"prompt", "prompt_token_ids"} & inputs.keys():
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        unknown = inputs.keys() - _INPUT_KEYS
        if unknown:
            raise KeyError(f"no such input: {sorted(unknown)}")
        if params is not None and params.multimodal_embedding_handles is not None:
            return self._from_handles(inputs, params)
        if "multi_modal_data" in inputs or "multi_modal_embeddings" in inputs:
            raise NotImplementedError("Input processor does not support multimodal embedding input")
        if "prompt_token_ids" in inputs:
            return list(inputs["prompt_token_ids"]), {}
        return self.tokenizer.encode(inputs["prompt"]), {}

    def _from_handles(
        self, inputs: dict[str, Any], params: DisaggregatedParams
    ) -> tuple[list[int], dict[str, Any]]:
        if not self.input_processor.support_mm_disagg:
            raise ValueError("Multimodal disaggregated inference is not supported for this model")
        if params.request_type is None:
            raise ValueError("Unknown request type: None")
        if params.request_type == "generation_only":
            raise ValueError("Generation-only mode should not need multimodal parameters")
        ids, deltas = params.mrope_position_ids_handle, params.mrope_position_deltas_handle
        if (ids is None) != (deltas is None):
            raise RuntimeError("both mRoPE handles must be provided, or both None")
        handles = params.multimodal_embedding_handles or []
        self._use_once(params, *handles, *(handle for handle in (ids, deltas) if handle is not None))
        multimodal = {"handles": handles, "hashes": params.multimodal_hashes, "mrope": None}
        if ids is not None:
            multimodal["mrope"] = (ids, deltas)
        if params.multimodal_layout is not None:  # newer releases: the encoder's prompt, taken as it is
            return list(params.multimodal_layout["prompt_token_ids"]), multimodal
        return self.input_processor.expand(inputs, handles), multimodal

    def _use_once(self, *objects: Any) -> None:
        """Refuse what an earlier request had: the executor changes it, and rebuilds each handle once."""
        for one in objects:
            if any(one is used for used in self._used):
                raise ValueError(f"a {type(one).__name__} serves one request only, this one is used twice")
            self._used.append(one)
