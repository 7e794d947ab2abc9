"""A PD worker's messages as OpenAI's objects: chunks of a stream, or one whole answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trtllm_mm_cache.errors import PdLostError, PdUnavailableError
from trtllm_mm_cache.frontend.prompt_logprobs import prompt_logprobs_field
from trtllm_mm_cache.frontend.text import AnswerText

Object = dict[str, Any]


@dataclass(frozen=True)
class Delta:
    """What one choice has grown by: text, and log probabilities of its tokens where they were asked for.

    The choice's last delta has a `finish_reason`. `is_new` says that its first tokens have just come, which a
    client may see before they make a text.
    """

    text: str
    logprobs: list[Object] | None = None
    choice: int = 0
    finish_reason: str | None = None
    is_new: bool = False


@dataclass
class Answer:
    """What is known of one answer while it comes; `texts` decode its choices, one each.

    `items` is how the request's items were found; `tokenizer` is one of the tokenizers library.
    """

    request_id: str
    model: str
    texts: Sequence[AnswerText]
    tokenizer: Any
    logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    usage: Object | None = None
    items: Mapping[str, int] | None = None
    prompt_logprobs: list[Object | None] | None = None
    _tokens: list[int] = field(init=False)
    _ended: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._tokens = [0] * len(self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all choices."""
        return sum(self._tokens)

    async def deltas(self, messages: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[Delta]:
        """Yield what the messages add, until every choice has ended; the first delta may be empty.

        A choice ends with the worker's last message about it, or before its first stop string. Raises
        `PdLostError` when the messages end before that.
        """
        finished = 0
        async for message in messages:
            self.items = message.get("items", self.items)
            self.usage = message.get("completion_usage", self.usage)
            if piece := (message.get("engine_data") or {}).get("prompt_logprobs"):
                self.prompt_logprobs = (self.prompt_logprobs or []) + piece
            finished += bool(message.get("finish_reason"))
            if (delta := self._delta(message)) is not None:
                yield delta
            if finished == len(self.texts):
                await _to_the_end(messages)
            if len(self._ended) == len(self.texts):
                return
        raise PdLostError("the PD worker ended in the middle of the answer; retry in a moment")

    def _delta(self, message: Mapping[str, Any]) -> Delta | None:
        """Return what a message adds; None for what comes of a choice that has ended at a stop string."""
        choice = message.get("index", 0)
        if choice in self._ended:
            return None
        token_ids = message.get("token_ids") or ()
        is_new = not self._tokens[choice] and bool(token_ids)
        self._tokens[choice] += len(token_ids)
        decoded = self.texts[choice]
        text, reason = decoded.add(token_ids), message.get("finish_reason")
        if decoded.stopped:
            reason = "stop"
        elif reason:
            text += decoded.end()
        if reason:
            self._ended.add(choice)
        logprobs = self._logprobs(message) if self.logprobs and token_ids else None
        return Delta(text, logprobs, choice, reason or None, is_new)

    def usage_object(self) -> Object:
        """Return the usage; the prompt's tokens count its images expanded.

        Cached tokens are those that the engine had keys and values of; where it does not say, the rows of
        embeddings that the cache had.
        """
        reported = self.usage or {}
        prompt_tokens = reported.get("prompt_tokens", 0)
        usage: Object = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": prompt_tokens + self.tokens,
        }
        if details := reported.get("prompt_tokens_details"):
            usage["prompt_tokens_details"] = details
        elif self.items:
            usage["prompt_tokens_details"] = {"cached_tokens": self.items.get("hit_rows", 0)}
        return usage

    def _logprobs(self, message: Mapping[str, Any]) -> list[Object]:
        alternatives = message.get("top_logprobs") or [[] for _ in message["token_ids"]]
        return [
            {
                **self._token(token_id, logprob),
                "top_logprobs": [self._token(each["token_id"], each["logprob"]) for each in others],
            }
            for token_id, logprob, others in zip(
                message["token_ids"], message.get("log_probs") or (), alternatives, strict=True
            )
        ]

    def _token(self, token_id: int, logprob: float) -> Object:
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}


class Form(Protocol):
    """How an endpoint writes an answer."""

    def chunk(self, delta: Delta) -> Object:
        """Return one chunk of a stream; the last one says why it ended."""
        ...

    def usage_chunk(self) -> Object:
        """Return the chunk that holds the usage, after all others."""
        ...

    def whole(self, deltas: Sequence[Delta]) -> Object:
        """Return the whole answer."""
        ...


class ChatForm:
    """The objects of /v1/chat/completions; each choice's first chunk names the role."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._common = _common("chatcmpl", answer)
        self._begun: set[int] = set()

    def chunk(self, delta: Delta) -> Object:
        """See `Form.chunk`."""
        begins = delta.choice not in self._begun
        content: Object = {"content": delta.text} if delta.text or begins else {}
        if begins:
            content = {"role": "assistant", **content}
            self._begun.add(delta.choice)
        choice = {
            "index": delta.choice,
            "delta": content,
            "logprobs": _content(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> Object:
        """See `Form.usage_chunk`."""
        usage = self._answer.usage_object()
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, deltas: Sequence[Delta]) -> Object:
        """See `Form.whole`."""
        choices = [self._choice(index, parts) for index, parts in enumerate(_by_choice(self._answer, deltas))]
        usage = self._answer.usage_object()
        prompt = prompt_logprobs_field(self._answer.prompt_logprobs, self._answer.tokenizer)
        return {**self._common, "object": "chat.completion", "choices": choices, "usage": usage, **prompt}

    def _choice(self, index: int, parts: Sequence[Delta]) -> Object:
        logprobs = (
            [each for delta in parts for each in delta.logprobs or ()] if self._answer.logprobs else None
        )
        return {
            "index": index,
            "message": {"role": "assistant", "content": _text(parts), "refusal": None},
            "logprobs": _content(logprobs),
            "finish_reason": parts[-1].finish_reason,
        }


class TextForm:
    """The objects of /v1/completions."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._common = {**_common("cmpl", answer), "object": "text_completion"}

    def chunk(self, delta: Delta) -> Object:
        """See `Form.chunk`."""
        return {**self._common, "choices": [self._choice(delta.choice, [delta])]}

    def usage_chunk(self) -> Object:
        """See `Form.usage_chunk`."""
        return {**self._common, "choices": [], "usage": self._answer.usage_object()}

    def whole(self, deltas: Sequence[Delta]) -> Object:
        """See `Form.whole`."""
        prompt = prompt_logprobs_field(self._answer.prompt_logprobs, self._answer.tokenizer)
        choices = [
            {**self._choice(index, parts), **prompt}
            for index, parts in enumerate(_by_choice(self._answer, deltas))
        ]
        return {**self._common, "choices": choices, "usage": self._answer.usage_object()}

    def _choice(self, index: int, parts: Sequence[Delta]) -> Object:
        reason = parts[-1].finish_reason
        return {"index": index, "text": _text(parts), "logprobs": None, "finish_reason": reason}


def _by_choice(answer: Answer, deltas: Sequence[Delta]) -> list[list[Delta]]:
    return [[delta for delta in deltas if delta.choice == index] for index in range(len(answer.texts))]


async def _to_the_end(messages: AsyncIterator[Mapping[str, Any]]) -> None:
    """Read what comes after a whole answer: a worker whose stream is closed early counts it as cancelled."""
    with contextlib.suppress(PdUnavailableError):  # it has nothing more to say
        async for _ in messages:
            pass


def _common(prefix: str, answer: Answer) -> Object:
    return {"id": f"{prefix}-{answer.request_id}", "created": answer.created, "model": answer.model}


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _content(logprobs: list[Object] | None) -> Object | None:
    return None if logprobs is None else {"content": logprobs, "refusal": None}
