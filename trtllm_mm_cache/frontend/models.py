"""The models that clients may name: the one that is served, and the LoRA adapters that PD workers have."""

from __future__ import annotations

import time
from typing import Any, Protocol

from trtllm_mm_cache.errors import UnknownModelError


class Adapters(Protocol):
    """What PD workers have besides the base model. See `runtime.adapters.AdapterDirectory`."""

    async def names(self) -> list[str]:
        """Return the names of all adapters, in order."""
        ...

    async def knows(self, name: str) -> bool:
        """Whether there is this adapter. Raises `PdUnavailableError` where that cannot be known now."""
        ...


class Models:
    """The base model `name`, and `adapters` of it. For use from one event loop."""

    def __init__(self, name: str, adapters: Adapters) -> None:
        self.name = name
        self._adapters = adapters
        self._created = int(time.time())

    async def adapter(self, model: str) -> str | None:
        """Return the adapter that a request for `model` is for, None for the base model.

        Raises `UnknownModelError`, or `PdUnavailableError` where that cannot be known now.
        """
        if model == self.name:
            return None
        if not await self._adapters.knows(model):
            raise UnknownModelError(f"model: no model of this name is served here; {self.name} is")
        return model

    async def described(self) -> list[dict[str, Any]]:
        """Return all models as OpenAI's API lists them, the base model first."""
        return [self._described(self.name), *map(self._described, await self._adapters.names())]

    async def one_described(self, model: str) -> dict[str, Any]:
        """Return one of them. Raises as `adapter` does."""
        await self.adapter(model)
        return self._described(model)

    def _described(self, model: str) -> dict[str, Any]:
        base = {} if model == self.name else {"parent": self.name}
        return {
            "id": model,
            "object": "model",
            "created": self._created,
            "owned_by": "trtllm-mm-cache",
            **base,
        }
