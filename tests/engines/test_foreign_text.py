"""What an engine's library says reaches a client only where it speaks of the request."""

from __future__ import annotations

import pytest

from trtllm_mm_cache.engines.checks import fit_for_client


@pytest.mark.parametrize(
    "text",
    [
        "absolute aspect ratio must be smaller than 200, got 2000.0",
        "prompt length 9000 exceeds max_seq_len 8192",
        "top_p must be at most 1\nsee https://docs.test/sampling",
    ],
)
def test_a_reason_that_helps_is_passed_on(text: str) -> None:
    assert fit_for_client(ValueError(text), "otherwise") == text.partition("\n")[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cannot open /models/secret/config.json",
        "illegal access at 0x7f001234",
        "<PIL.Image.Image image mode=RGB size=1x1 at 0x7F>",
        "np.concatenate() got an unexpected argument",
        "[TensorRT-LLM][ERROR] tensorrt_llm::executor failed",
        "'NoneType' has no attribute '_fast_path'",
        "forged log line\r2026-01-01 ERROR",
        "x" * 500,
        r"C:\models\secret",
    ],
)
def test_a_librarys_insides_are_not(text: str) -> None:
    assert fit_for_client(RuntimeError(text), "otherwise") == "otherwise"
