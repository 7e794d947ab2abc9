"""What becomes of a PD worker's adapters at its start."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.pd.process import _adapters
from trtllm_mm_cache.settings import PdSettings


class PeerGenerator:
    """A generator with adapters, as far as a start goes."""

    def __init__(self, adapters: Sequence[str]) -> None:
        self.adapters = adapters
        self.closed = False

    async def load_adapters(self) -> Sequence[str]:
        if not self.adapters:
            raise ConfigurationError("cannot be loaded")
        return self.adapters

    async def close(self) -> None:
        self.closed = True


async def start(*adapters: str) -> tuple[Sequence[str], PeerGenerator]:
    generator = PeerGenerator(adapters)
    settings = PdSettings(model_path="models/Org.Model")
    return await _adapters(generator, settings), generator  # type: ignore[arg-type]


async def test_names_that_differ_are_taken() -> None:
    names, generator = await start("cats", "org/cats", "org/cats-2", "org.model")
    assert names == ("cats", "org/cats", "org/cats-2", "org.model")
    assert not generator.closed


@pytest.mark.parametrize("names", [("Org.Model",), ("org/cats", "org_cats"), ("cats", "Cats")])
async def test_names_that_are_one_to_discovery_end_the_start(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"lora_modules: .*give the adapter another one"):
        await start(*names)


async def test_an_engine_whose_adapters_cannot_be_loaded_is_closed() -> None:
    generator = PeerGenerator(())
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        await _adapters(generator, PdSettings(model_path="m"))  # type: ignore[arg-type]
    assert generator.closed
