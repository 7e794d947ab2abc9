"""The public classes; `tensorrt_llm/llmapi/__init__.py`, 1.3."""

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi.llm import LLM, RequestOutput
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams

__all__ = ["LLM", "DisaggregatedParams", "GuidedDecodingParams", "RequestOutput", "SamplingParams"]
