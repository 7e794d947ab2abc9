"""The embedded default engine: Hugging Face transformers on the CPU or any torch device."""

from trtllm_mm_cache.engines.transformers.encoder import TransformersVisionEncoder
from trtllm_mm_cache.engines.transformers.generator import TransformersGenerator
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs

__all__ = ["TransformersEngineArgs", "TransformersGenerator", "TransformersVisionEncoder"]
