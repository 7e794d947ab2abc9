"""A peer of TensorRT-LLM's Python surface; see ../README.md."""

from tensorrt_llm.llmapi.llm import LLM
from tensorrt_llm.llmapi.mm_encoder import MultimodalEncoder
from tensorrt_llm.sampling_params import SamplingParams

__version__ = "1.3.0rc29"

__all__ = ["LLM", "MultimodalEncoder", "SamplingParams", "__version__"]
