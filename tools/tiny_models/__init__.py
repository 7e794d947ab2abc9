"""Complete model directories with random weights, made offline in seconds.

Their architectures, processors and tokenizers are the real ones at toy sizes: the tests compare
logits on them, and the launch script serves one when no model is named.
"""

from .make import ARCHITECTURES, make_tiny_model, write_model

__all__ = ["ARCHITECTURES", "make_tiny_model", "write_model"]
