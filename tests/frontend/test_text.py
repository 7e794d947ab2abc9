"""An answer's tokens become the text that the tokenizer makes of them all; it ends before a stop string."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.contract import ARCHITECTURES
from trtllm_mm_cache.frontend.prompt import Prompts
from trtllm_mm_cache.frontend.text import AnswerText

PROMPT = "Hello there:"
SAID = "A cat, 2 dogs\n\nund ein Käfer — 😀 sitting   there. 猫が好き</s> <b>x</b>"
FRACTION = "\ufffd"


@pytest.fixture(scope="session", params=ARCHITECTURES)
def prompts(request: pytest.FixtureRequest, prompts_of: Callable[[str], Prompts]) -> Prompts:
    return prompts_of(request.param)


def chunks(token_ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut a list into pieces of these sizes, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(token_ids):
        size = sizes[turn % len(sizes)]
        pieces.append(list(token_ids[at : at + size]))
        at, turn = at + size, turn + 1
    return pieces


def streamed(
    prompts: Prompts,
    token_ids: Sequence[int],
    sizes: Sequence[int] = (1,),
    stop: Sequence[str] = (),
    *,
    skip: bool = True,
    prompt: Sequence[int] | None = None,
) -> tuple[list[str], AnswerText]:
    tail = prompts.backend.encode(PROMPT, add_special_tokens=False).ids if prompt is None else prompt
    answer = AnswerText(prompts.backend, tail[-8:], stop, skip_special_tokens=skip)
    pieces = [answer.add(piece) for piece in chunks(token_ids, sizes)]
    return [*pieces, "" if answer.stopped else answer.end()], answer


def decoded(prompts: Prompts, token_ids: Sequence[int], *, skip: bool = True) -> str:
    """Return what the tokenizer makes of all tokens after the prompt, by decoding both."""
    tail = prompts.backend.encode(PROMPT, add_special_tokens=False).ids
    before = prompts.backend.decode(tail, skip_special_tokens=skip)
    whole = str(prompts.backend.decode([*tail, *token_ids], skip_special_tokens=skip))
    assert whole.startswith(before)
    return whole[len(before) :]


def vocabulary(prompts: Prompts) -> int:
    return int(prompts.backend.get_vocab_size())


@functools.cache
def usable(prompts: Prompts) -> list[int]:
    """Return the tokens whose text does not depend on later ones.

    Tokenizers of Llama 2's kind take a run of bytes for text only when all of it is valid: a character that
    was sent already would become two fractions when a byte that is none follows.
    """
    every = range(vocabulary(prompts))
    return list(set(every) - set(bytes_alone(prompts))) if falls_back_to_bytes(prompts) else list(every)


def falls_back_to_bytes(prompts: Prompts) -> bool:
    return "ByteFallback" in str(prompts.backend.decoder)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_pieces_are_the_text_of_all_tokens(prompts: Prompts, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.sampled_from(usable(prompts)), max_size=40))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    skip = data.draw(st.booleans())
    pieces, _ = streamed(prompts, ids, sizes, skip=skip)
    text, whole = "".join(pieces), decoded(prompts, ids, skip=skip)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {FRACTION}  # it ends in the middle of a character


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_text_of_many_scripts_is_streamed_as_it_is(prompts: Prompts, size: int) -> None:
    ids = prompts.backend.encode(SAID, add_special_tokens=False).ids
    pieces, _ = streamed(prompts, ids, [size])
    assert "".join(pieces) == decoded(prompts, ids)
    assert not any(piece.endswith(FRACTION) for piece in pieces)


def bytes_alone(prompts: Prompts) -> list[int]:
    """Return the ids of tokens that are one byte each, of the tokenizer's own kind: no character of ASCII."""
    backend = prompts.backend
    return [index for index in range(vocabulary(prompts)) if backend.decode([index]) == FRACTION]


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_bytes_that_are_no_characters_do_not_hide_what_comes_after(
    prompts: Prompts, data: st.DataObject
) -> None:
    """Such an answer is decoded in pieces: else each token would cost as much as all before it."""
    alone = bytes_alone(prompts)
    if not alone:
        pytest.skip("this tokenizer has no tokens of single bytes")
    said = prompts.backend.encode("Käfer 猫 😀 sat", add_special_tokens=False).ids
    noise = st.lists(st.sampled_from(alone), min_size=20, max_size=120)
    ids = [*data.draw(noise), *said, *data.draw(noise)]
    pieces, _ = streamed(prompts, ids)
    text, whole = "".join(pieces), decoded(prompts, ids)
    assert "fer 猫 😀 sat" in text
    if not falls_back_to_bytes(prompts):
        assert whole.startswith(text)
        assert set(whole[len(text) :]) <= {FRACTION}
    quiet = [not piece for piece in pieces]
    assert not any(all(quiet[at : at + 40]) for at in range(len(quiet) - 40))


def test_bytes_after_a_character_of_bytes_are_no_defect(prompts: Prompts) -> None:
    """The library's stream raises here for tokenizers of Llama 2's kind."""
    alone = bytes_alone(prompts)
    if not alone:
        pytest.skip("this tokenizer has no tokens of single bytes")
    character, said = (prompts.backend.encode(text, add_special_tokens=False).ids for text in ("猫", " sat"))
    ids = [*character, alone[0], *said]
    pieces, _ = streamed(prompts, ids)
    assert "".join(pieces).lstrip().startswith("猫")
    assert "".join(pieces).endswith(" sat")


def test_tokens_without_text_are_not_kept(prompts: Prompts) -> None:
    backend = prompts.backend
    silent = next((index for index in range(vocabulary(prompts)) if backend.decode([index]) == ""), None)
    if silent is None:
        pytest.skip("this tokenizer has no special tokens")
    said = backend.encode(" sat", add_special_tokens=False).ids
    ids = [*[silent] * 300, *said]
    pieces, answer = streamed(prompts, ids)
    assert "".join(pieces) == decoded(prompts, ids)
    assert len(answer._pending) < 40


def test_special_tokens_are_shown_when_they_are_asked_for(prompts: Prompts) -> None:
    ends = prompts.eos_token_ids[0]
    name = prompts.backend.id_to_token(ends)
    said = prompts.backend.encode("It sat", add_special_tokens=False).ids
    shown, _ = streamed(prompts, [*said, ends], skip=False)
    hidden, _ = streamed(prompts, [*said, ends])
    assert name in "".join(shown)
    assert name not in "".join(hidden)


def test_a_prompt_that_ends_inside_a_character_is_not_answered_with_itself(prompts: Prompts) -> None:
    alone = bytes_alone(prompts)
    if not alone:
        pytest.skip("this tokenizer has no tokens of single bytes")
    prompt = [*prompts.backend.encode("Hello", add_special_tokens=False).ids, alone[0]]
    said = prompts.backend.encode("x sat", add_special_tokens=False).ids
    pieces, _ = streamed(prompts, said, prompt=prompt)
    assert "Hello" not in "".join(pieces)
    assert "".join(pieces).endswith("sat")


def until_first_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return what comes before the stop string that is whole first, as if the text came by characters."""
    for end in range(1, len(text) + 1):
        if met := [each for each in stop if text[:end].endswith(each)]:
            return text[: end - max(map(len, met))], True
    return text, False


@given(
    said=st.text("ab ä猫", max_size=40),
    stop=st.lists(st.text("ab ä猫", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_a_stop_string_cuts_the_stream_where_it_cuts_the_text(
    prompts: Prompts, said: str, stop: list[str], sizes: list[int]
) -> None:
    ids = prompts.backend.encode(said, add_special_tokens=False).ids
    pieces, answer = streamed(prompts, ids, sizes, stop)
    assert ("".join(pieces), answer.stopped) == until_first_stop(decoded(prompts, ids), stop)


def test_only_what_may_begin_a_stop_string_is_held_back(prompts_of: Callable[[str], Prompts]) -> None:
    prompts = prompts_of("qwen2_vl")
    encode = prompts.backend.encode
    answer = AnswerText(prompts.backend, [], ["END.", "Enough"], skip_special_tokens=True)
    assert answer.add(encode("So far E").ids) == "So far "
    assert answer.add(encode("N").ids) == ""
    assert answer.add(encode("Dless").ids) == "ENDless"
    assert answer.add(encode(" En").ids) == " "
    assert not answer.stopped
    assert answer.end() == "En"
    assert answer.end() == ""


def test_nothing_comes_after_a_stop_string(prompts_of: Callable[[str], Prompts]) -> None:
    prompts = prompts_of("qwen2_vl")
    answer = AnswerText(prompts.backend, [], ["x"], skip_special_tokens=True)
    assert answer.add(prompts.backend.encode("abcxdef").ids) == "abc"
    assert answer.stopped
    assert answer.add(prompts.backend.encode("more").ids) == ""
    assert answer.end() == ""
