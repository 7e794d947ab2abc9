"""Errors that nobody has asked for: asyncio writes each into the log, as if it were a defect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_error_is_left_to_asyncio(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Import it into a conftest: it holds for every test there."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"] == []
