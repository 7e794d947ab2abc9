"""Runs a benchmark's `main` in this process, small, and returns the JSON object of its last line."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

SmallRun = Callable[..., dict[str, Any]]


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[SmallRun]:
    def run(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        import_module(f"benchmarks.{name}").main()
        report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["benchmark"] == name
        assert report["machine"]["cores"] >= 1
        return report

    yield run
    gc.unfreeze()  # one of them freezes what is there
