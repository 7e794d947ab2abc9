"""The TensorRT-LLM engine. Imports nothing of `tensorrt_llm` until an engine is loaded."""

from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs

__all__ = ["TrtllmEncoderArgs", "TrtllmLlmArgs"]
