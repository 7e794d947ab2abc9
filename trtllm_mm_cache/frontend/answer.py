"""A PD worker's messages as OpenAI's objects: chunks of a stream, or one whole answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trtllm_mm_cache.errors import PdLostError, PdUnavailableError
from trtllm_mm_cache.frontend.text import AnswerText

Object = dict[str, Any]


@dataclass
class Answer:
    """What is known of one answer while it comes.

    `items` is how the request's items were found; `tokenizer` is one of the tokenizers library.
    """

    request_id: str
    model: str
    text: AnswerText
    tokenizer: Any
    logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    finish_reason: str | None = None
    usage: Object | None = None
    items: Mapping[str, int] | None = None
    _tokens_before: int = 0

    async def deltas(self, messages: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[Delta]:
        """Yield what the messages add, until the answer ends; the first delta may be empty.

        It ends with the worker's last message, or before the first stop string. Raises `PdLostError` when
        the messages end before it.
        """
        async for message in messages:
            self.items = message.get("items", self.items)
            self.usage = message.get("completion_usage", self.usage)
            token_ids = message.get("token_ids") or ()
            self._tokens_before = self.tokens
            self.tokens += len(token_ids)
            text = self.text.add(token_ids)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif reason := message.get("finish_reason"):
                self.finish_reason = reason
                text += self.text.end()
            yield Delta(text, self._logprobs(message) if self.logprobs and token_ids else None)
            if message.get("finish_reason"):
                await _to_the_end(messages)
            if self.finish_reason is not None:
                return
        raise PdLostError("the PD worker ended in the middle of the answer; retry in a moment")

    @property
    def is_new(self) -> bool:
        """Whether the first tokens have just come, which a client may see before they make a text."""
        return self.tokens > 0 == self._tokens_before

    def usage_object(self) -> Object:
        """Return the usage; the prompt's tokens count its images expanded."""
        prompt_tokens = (self.usage or {}).get("prompt_tokens", 0)
        usage: Object = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": prompt_tokens + self.tokens,
        }
        if self.items:
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


@dataclass(frozen=True)
class Delta:
    """Text that an answer has grown by, and the log probabilities of its tokens where they were asked for."""

    text: str
    logprobs: list[Object] | None = None


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
    """The objects of /v1/chat/completions; the first chunk names the role."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._common = _common("chatcmpl", answer)
        self._begun = False

    def chunk(self, delta: Delta) -> Object:
        """See `Form.chunk`."""
        content: Object = {"content": delta.text} if delta.text or not self._begun else {}
        if not self._begun:
            content = {"role": "assistant", **content}
            self._begun = True
        choice = {
            "index": 0,
            "delta": content,
            "logprobs": _content(delta.logprobs),
            "finish_reason": self._answer.finish_reason,
        }
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> Object:
        """See `Form.usage_chunk`."""
        usage = self._answer.usage_object()
        return {**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, deltas: Sequence[Delta]) -> Object:
        """See `Form.whole`."""
        logprobs = (
            [each for delta in deltas for each in delta.logprobs or ()] if self._answer.logprobs else None
        )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": _text(deltas), "refusal": None},
            "logprobs": _content(logprobs),
            "finish_reason": self._answer.finish_reason,
        }
        usage = self._answer.usage_object()
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage}


class TextForm:
    """The objects of /v1/completions."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._common = {**_common("cmpl", answer), "object": "text_completion"}

    def chunk(self, delta: Delta) -> Object:
        """See `Form.chunk`."""
        return {**self._common, "choices": [self._choice(delta.text)]}

    def usage_chunk(self) -> Object:
        """See `Form.usage_chunk`."""
        return {**self._common, "choices": [], "usage": self._answer.usage_object()}

    def whole(self, deltas: Sequence[Delta]) -> Object:
        """See `Form.whole`."""
        usage = self._answer.usage_object()
        return {**self._common, "choices": [self._choice(_text(deltas))], "usage": usage}

    def _choice(self, text: str) -> Object:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": self._answer.finish_reason}


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
