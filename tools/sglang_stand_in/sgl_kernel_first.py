"""Imports the stand-in `sgl_kernel` before `sglang`, in every process that imports that.

SGLang looks its operators up while it is imported, in processes of its own too, so nothing later is in time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BeforeSglang:
    """Finds nothing: it only sees which module is asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "sglang":
            sys.meta_path.remove(self)
            importlib.import_module("sgl_kernel")
        return None


sys.meta_path.insert(0, _BeforeSglang())
