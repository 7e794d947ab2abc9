"""What runs inside vLLM's workers for `vllm_arms.py`: it counts the images that the vision tower encodes.

So that a hit is known to be one, whatever the arm: sent to the workers by `collective_rpc`.
"""

from __future__ import annotations

from typing import Any


def count_images(worker: Any) -> None:
    """Count from now on what the worker's vision tower encodes."""
    model = worker.model_runner.get_model()
    encode = model.embed_multimodal
    worker.images_encoded = 0

    def counted(**inputs: Any) -> Any:
        made = encode(**inputs)
        worker.images_encoded += len(made)
        return made

    model.embed_multimodal = counted


def images_encoded(worker: Any) -> int:
    """Return how many there were since `count_images`."""
    return int(worker.images_encoded)
