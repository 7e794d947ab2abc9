"""Digest of everything that decides an embedding's bytes besides the image and its processor kwargs."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from trtllm_mm_cache.errors import ConfigurationError

FORMAT_VERSION = 1
"""Raise it when an embedding's layout or metadata changes: old and new workers then refuse each other."""

_CONFIGURATION_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def model_fingerprint(model_path: Path, *, engine: str, embedding_dtype: str) -> str:
    """Return 64 hex digits that are equal for equal models, wherever they lie on disk.

    They cover the engine's name (with whatever of its version and settings can change a feature:
    the engine puts that into `engine`), this package's embedding format, the configuration of model,
    preprocessor and tokenizer (the expanded placeholder is text), the weights, and the dtype in which
    embeddings are stored. Files count by name and raw bytes, so a reformatted config.json is another
    model: a false difference costs misses, a false equality would serve wrong embeddings.

    The weights are read once, memory-mapped and hashed on all cores: the time is their size divided
    by the smaller of the storage's read rate and the core count times one core's BLAKE3 rate; a
    second start on the same machine reads them from the page cache.

    Blocking. Raises `ConfigurationError` when the directory is missing, has no config.json or no weights.
    """
    if not model_path.is_dir():
        raise ConfigurationError("the model directory does not exist: name one that does, or download it")
    if not (model_path / "config.json").is_file():
        raise ConfigurationError("the model directory has no config.json, so it holds no Hugging Face model")
    digest = blake3()
    _add(digest, "format", str(FORMAT_VERSION).encode())
    _add(digest, "engine", engine.encode())
    _add(digest, "embedding dtype", embedding_dtype.encode())
    for name in _CONFIGURATION_FILES:
        path = model_path / name
        if path.is_file():
            _add(digest, name, path.read_bytes())
    for shard in weight_files(model_path):
        weights = blake3(max_threads=blake3.AUTO).update_mmap(shard)
        _add(digest, shard.name, weights.digest())
    return digest.hexdigest()


def transformers_fingerprint(
    model_path: Path, *, release: str, dtype: str, embedding_dtype: str, images: str = "pil"
) -> str:
    """Return the fingerprint of what the tower of transformers `release` makes, computing in `dtype`.

    `images` is the library that prepares the pixels: "pil" or "torchvision", whose pixels differ.

    An engine without an encode worker of its own says with it whose embeddings it takes.

    The release is part of it. It brings the image processor and the placeholder text,
    and both have changed between releases in more than the last bit (default resampling, tiling,
    marker tokens). The price is that a cache does not outlive an upgrade and that both workers must
    be upgraded together; the alternative is a wrong embedding that nothing would notice. Left out is
    what moves the last bits only: torch's version, the attention kernel, the processor's model.

    Blocking: reads all weights. Raises as `model_fingerprint`.
    """
    engine = f"transformers {release} computing in {dtype}"
    if images != "pil":
        engine += f", images by {images}"
    return model_fingerprint(model_path, engine=engine, embedding_dtype=embedding_dtype)


def weight_files(model_path: Path) -> list[Path]:
    """Return the model's weight files in the order of their names: safetensors, else torch's .bin.

    An index file decides which shards belong to the model; other weights in the directory do not count.
    Raises `ConfigurationError` when there are none, or when a shard of the index is missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = model_path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in shards if not (model_path / name).is_file()]
            if missing:
                raise ConfigurationError(
                    f"the model's weight shard {missing[0]} is missing: download it again"
                )
            return [model_path / name for name in shards]
        found = sorted(model_path.glob(f"*.{suffix}"))
        if found:
            return found
    raise ConfigurationError("the model directory has no weights: it needs *.safetensors or *.bin files")


def _add(digest: blake3, field: str, value: bytes) -> None:
    """Add one field, framed by lengths so that no two field lists give the same stream."""
    name = field.encode()
    digest.update(len(name).to_bytes(8, "little") + name + len(value).to_bytes(8, "little") + value)
