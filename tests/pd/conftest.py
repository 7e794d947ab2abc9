"""The bench as fixtures of this folder."""

from tests.pd.bench import allow_private_addresses, bench, require_salt, settings

__all__ = ["allow_private_addresses", "bench", "require_salt", "settings"]
