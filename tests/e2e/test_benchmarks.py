"""The benchmarks that drive the whole stack, small, without their load generator."""

from __future__ import annotations

from pathlib import Path

from benchmarks.burst import measure
from benchmarks.dataset import data_url, picture, pooled
from benchmarks.serving_arms import Load, Stacks, prompt_tokens
from tests.e2e.stack import Stack


async def test_a_burst_for_one_picture_is_one_encode(stack: Stack) -> None:
    report = await measure(stack, requests=8, rounds=2)
    assert report["encodes"] == [1, 1]
    assert 0 < report["ms"]["p50"] <= report["ms"]["p99"]


def test_the_ideals_text_is_as_long_as_a_picture_is(stack: Stack, tmp_path: Path) -> None:
    load = Load(pooled(4, 2, words=1), width=112, height=56, concurrency=1, output_tokens=1)
    stacks = Stacks(stack, stack, tmp_path, tmp_path, tmp_path)
    text = stacks.stand_in(load)
    shown = prompt_tokens(stack, "the", data_url(picture(1, 112, 56)))
    assert prompt_tokens(stack, f"{text} the") == shown
