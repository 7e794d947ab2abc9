"""The tiers that a worker's settings ask for."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.observability.metrics import Step
from trtllm_mm_cache.runtime.secret import make_secret, read_secret
from trtllm_mm_cache.settings import TierSettings
from trtllm_mm_cache.tiers.chain import StoredTiers
from trtllm_mm_cache.tiers.disk import DiskStorage
from trtllm_mm_cache.tiers.disk_folder import check_folder
from trtllm_mm_cache.tiers.format import Sealer
from trtllm_mm_cache.tiers.limits import TierLimits
from trtllm_mm_cache.tiers.rules import EntryRules
from trtllm_mm_cache.tiers.storage import Storage
from trtllm_mm_cache.tiers.stored import StoredTier

_NO_MODEL = "0" * 64
_WHAT = "the secret that entries are sealed with"
_SWEEPS = 20  # what is too old stays on disk for a twentieth of the age, and an hour, at most
_MOST_SWEEP_S = 3600.0


def stored_tiers(
    settings: TierSettings, fingerprint: str, registry: CollectorRegistry, *, arenas: Iterable[int]
) -> StoredTiers:
    """Return the tiers of a worker for the model with `fingerprint` and with `arenas` of these sizes.

    Contacts nobody: a store may be dead. Raises `ConfigurationError` for a folder or a secret that others can
    get at, and for a store without a secret.
    """
    storages = list(_storages(settings, fingerprint))
    if not storages:
        return StoredTiers()
    rules = EntryRules(Sealer(_secret(settings)), fingerprint, max_age_s=settings.max_age_s)
    limits = TierLimits(
        at_use=settings.multimodal_embedding_cache_store_at_use,
        waiting_bytes=TierLimits.waiting_for(arenas),
    )
    seconds = Step.new(registry, "tier", "One call of a tier: lookup, read or store.", "tier", "step")
    tiers = [StoredTier(storage, rules, limits, seconds) for storage in storages]
    for tier in tiers:
        registry.register(tier)
    return StoredTiers(tiers)


def check_tiers(settings: TierSettings) -> None:
    """Raise `ConfigurationError` for what `stored_tiers` would refuse: before a model is loaded."""
    storages = list(_storages(settings, _NO_MODEL))
    if storages:
        _secret(settings)
    for storage in storages:
        storage.close()


def _storages(settings: TierSettings, fingerprint: str) -> Iterable[Storage]:
    folder, age = settings.multimodal_embedding_cache_disk_path, settings.max_age_s
    if folder is not None:
        sweep_s = None if age is None else min(age / _SWEEPS, _MOST_SWEEP_S)
        yield DiskStorage(folder, fingerprint, settings.disk_bytes, sweep_s=sweep_s)
    url = settings.multimodal_embedding_cache_store_url
    if url is not None:
        try:
            from trtllm_mm_cache.tiers.store import StoreStorage
        except ImportError as error:
            raise ConfigurationError(
                "a store (MM_CACHE_STORE_URL) needs the client: pip install 'trtllm-mm-cache[store]'"
            ) from error
        yield StoreStorage(url.get_secret_value(), fingerprint, max_age_s=age)


def _secret(settings: TierSettings) -> bytes:
    file, folder = (
        settings.multimodal_embedding_cache_secret_file,
        settings.multimodal_embedding_cache_disk_path,
    )
    if file is not None:
        return read_secret(file, _WHAT)
    if settings.multimodal_embedding_cache_store_url is not None or folder is None:
        raise ConfigurationError(
            "a store needs a secret that its entries are sealed with, and MM_CACHE_ENTRIES_SECRET_FILE "
            "(--multimodal-embedding-cache-secret-file) is not set; make one with "
            "`(umask 077; openssl rand -hex 32 > FILE)` and give it to every worker that shares the store"
        )
    check_folder(folder)
    make_secret(folder / "secret", _WHAT)
    return read_secret(folder / "secret", _WHAT)
