"""Answers that must be JSON of a schema or match a pattern."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from tests.engines.conftest import Halves
from tests.engines.contract import reference_processor
from tests.engines.decoding import Answer, ask, together
from trtllm_mm_cache.engines.base import Constraint
from trtllm_mm_cache.errors import InvalidRequestError

DRAWN: dict[str, Any] = {"ignore_eos": False, "temperature": 1.0, "max_tokens": 900}
"""The tiny model's own words are noise: without a constraint no answer would fit any of these."""


def words(halves: Halves, answer: Answer) -> str:
    tokenizer = reference_processor(halves.model_dir).tokenizer
    return str(tokenizer.decode(answer.tokens, skip_special_tokens=True))


async def constrained(halves: Halves, kind: Any, text: Any, **sampling: Any) -> Answer:
    text = text if isinstance(text, str) else json.dumps(text)
    return await ask(halves, **{**DRAWN, **sampling, "constraint": Constraint(kind, text)})


async def test_an_answer_is_json_of_the_schema(halves: Halves) -> None:
    """For each kind of tokenizer, with whatever its model would rather say."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    for seed in range(2):
        answer = await constrained(halves, "json_schema", schema, seed=seed)
        assert answer.finish_reason == "stop"
        read = json.loads(words(halves, answer))
        assert read["name"] in ("cat", "dog")
        assert isinstance(read["count"], int)
        assert set(read) == {"name", "count"}


async def test_an_answer_matches_the_pattern(small: Halves) -> None:
    pattern = r"(red|blue), [0-9]{2,4} and (\.|\-)x"
    answers = {
        words(small, await constrained(small, "regex", pattern, seed=seed)).strip() for seed in range(6)
    }
    assert len(answers) > 1
    assert all(re.fullmatch(pattern, text) for text in answers), answers


async def test_a_constrained_answer_that_is_cut_says_so(small: Halves) -> None:
    answer = await constrained(small, "regex", "[a-z]{40}", max_tokens=3)
    assert (len(answer.tokens), answer.finish_reason) == (3, "length")


async def test_constraints_beside_each_other_and_beside_penalties(small: Halves) -> None:
    answers = await together(
        [
            constrained(small, "regex", "a{30}", presence_penalty=2.0, frequency_penalty=2.0, logprobs=1),
            ask(small, max_tokens=5),
            constrained(small, "regex", "b{30}", temperature=0.0, logit_bias={5: 100.0}),
        ]
    )
    assert [words(small, answers[index]).strip() for index in (0, 2)] == ["a" * 30, "b" * 30]
    assert len(answers[0].logprobs) == len(answers[0].tokens)


async def test_a_pattern_that_would_blow_up_costs_little(small: Halves) -> None:
    answer = await constrained(small, "regex", "((a{1,1000}){1,1000}){1,1000}", max_tokens=5)
    assert set(words(small, answer).strip()) == {"a"}


async def test_whitespace_in_json_has_an_end(small: Halves) -> None:
    space = reference_processor(small.model_dir).tokenizer("a\nb", add_special_tokens=False)["input_ids"][-2]
    fields = {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    schema = {"type": "object", **fields}
    answer = await constrained(small, "json_schema", schema, logit_bias={space: 100.0})
    assert answer.tokens.count(space) > 20
    assert (answer.finish_reason, json.loads(words(small, answer))) == ("stop", {"a": 1})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "no JSON"),
        ("json_schema", "[1]"),
        ("json_schema", '{"type": "nothing known"}'),
        ("json_schema", '{"$ref": "https://elsewhere.test/schema.json"}'),
        ("regex", "("),
        ("regex", r"(a)\1"),
        ("regex", "a$b"),
        ("json_schema", '{}, {"lark_grammar": "start: /.*/"}'),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_it_computes(
    small: Halves, kind: Any, text: str
) -> None:
    with pytest.raises(InvalidRequestError, match="response_format"):
        await constrained(small, kind, text)
    assert (await ask(small, max_tokens=2)).finish_reason == "length"


@pytest.mark.parametrize("name", ["ignore_eos", "min_tokens"])
async def test_options_that_speak_against_an_end(small: Halves, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"leave {name} out"):
        await constrained(small, "regex", "a+", **{name: 3})


async def test_without_the_library_it_is_refused(small: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match="llguidance is missing"):
        await constrained(small, "regex", "a+")
