"""A repair of vLLM's workers on a CPU: without it one request with a seed can end the engine.

A prompt that is computed in several steps draws a token in each, of which only the last counts. vLLM takes
the others back by moving the request's generator by CUDA's offset (`_bookkeeping_sync` in
`gpu_model_runner.py`, 0.32), which torch's generators for the CPU do not have: RuntimeError, and EngineCore
ends, with every request.
"""

from __future__ import annotations

import torch


class RewindingGenerator(torch.Generator):
    """A generator of the CPU that begins again where vLLM takes a draw back.

    That is exact for a prompt: nothing that counts was drawn before. An answer that was preempted, and is
    computed again in several steps, goes on with the numbers from its beginning.
    """

    def get_offset(self) -> int:
        """Return what `set_offset` gets back, less than zero, for a draw that is taken back."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Begin again."""
        del offset
        return self.manual_seed(self.initial_seed())


def make_generators_rewind() -> None:
    """Have this process make such generators from now on: for vLLM's workers on a CPU alone."""
    torch.Generator = RewindingGenerator  # type: ignore[misc]
