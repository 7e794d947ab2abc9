"""The tiny models' tokenizers, as the frontend reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.engines.conftest import ModelFactory, model_of
from trtllm_mm_cache.frontend.prompt import Prompts

__all__ = ["model_of", "prompts_of"]


@pytest.fixture(scope="session")
def prompts_of(model_of: ModelFactory) -> Callable[[str], Prompts]:
    """Return what renders, tokenises and decodes for an architecture's tiny model."""
    return functools.cache(lambda architecture: Prompts.from_model(model_of(architecture)))
