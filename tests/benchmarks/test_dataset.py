"""The data sets: the same bytes each time, exactly the reuse that is asked for, the window that slides."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.dataset import data_url, picture, pooled, reuse, sliding_window, write_aiperf


@pytest.mark.parametrize(("count", "pool", "expected"), [(100, 100, 0.0), (100, 20, 0.8), (1000, 200, 0.8)])
def test_pooled_requests_have_the_reuse_exactly(count: int, pool: int, expected: float) -> None:
    requests = pooled(count, pool, words=5)
    assert reuse(requests) == pytest.approx(expected)
    assert len({request.pictures for request in requests}) == pool
    assert requests == pooled(count, pool, words=5)


def test_a_window_shows_one_new_picture_in_each_turn() -> None:
    requests = sliding_window(users=3, turns=8, window=5, words=5)
    for user in range(3):
        turns = [request for request in requests if request.session == user]
        assert [sum(not came for came in turn.repeated) for turn in turns] == [5, 1, 1, 1, 1, 1, 1, 1]
        for before, after in itertools.pairwise(turns):
            assert before.pictures[1:] == after.pictures[:-1]


def test_pictures_are_the_same_bytes_for_a_seed_and_others_for_another() -> None:
    assert picture(1, 64, 32) == picture(1, 64, 32) != picture(2, 64, 32)
    assert Image.open(io.BytesIO(picture(1, 64, 32))).size == (64, 32)


def test_the_ideal_shows_a_picture_once_and_text_in_its_place_afterwards(tmp_path: Path) -> None:
    requests = pooled(20, 5, words=3)
    shown, replaced = tmp_path / "shown", tmp_path / "replaced"
    write_aiperf(shown, requests, first_seed=0, width=28, height=28, stand_in=None)
    write_aiperf(replaced, requests, first_seed=0, width=28, height=28, stand_in="a a a")
    for request, with_all, with_first in zip(
        requests, shown.read_text().splitlines(), replaced.read_text().splitlines(), strict=True
    ):
        whole, ideal = json.loads(with_all), json.loads(with_first)
        assert whole["images"] == [data_url(picture(request.pictures[0], 28, 28))]
        assert ideal["images"] == ([] if request.is_hit else whole["images"])
        assert ideal["text"].startswith("a a a ") is request.is_hit


def test_every_line_is_a_session_of_its_own_also_in_conversations(tmp_path: Path) -> None:
    """AIPerf mixed up lines that bore one session: some were sent twice and others never."""
    requests = sliding_window(users=2, turns=3, window=2, words=1)
    path = tmp_path / "requests"
    write_aiperf(path, requests, first_seed=0, width=28, height=28, stand_in=None)
    sessions = [json.loads(line)["session_id"] for line in path.read_text().splitlines()]
    assert len(set(sessions)) == len(requests)
