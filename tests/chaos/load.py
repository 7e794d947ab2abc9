"""The clients: threads that ask and compare each answer with the right one."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai

from tests.chaos.questions import MAX_TOKENS, Question

CLIENT_TIMEOUT_S = 60.0
_NEW_SALTS = 0.5
_STREAMED = 0.5
_PAUSE_AFTER_FAILURE_S = 0.05


@dataclass
class Outcomes:
    """What came of all requests. `failures` counts by the error as the client sees it."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def requests(self) -> int:
        return self.right + len(self.wrong) + self.failures.total()


class Load:
    """Asks from `clients` threads until it is closed.

    Half of the requests carry a salt that no other has: the same picture, but a key of its own, so a miss.
    The others repeat the bank's pictures. Half are streamed.
    """

    def __init__(self, url: str, questions: Sequence[Question], *, clients: int, seed: int) -> None:
        self.outcomes = Outcomes()
        self._questions = questions
        self._pictures = [question for question in questions if question.pictures]
        self._client = openai.OpenAI(base_url=url, api_key="none", timeout=CLIENT_TIMEOUT_S, max_retries=0)
        self._model = self._client.models.list().data[0].id
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(clients + 8, thread_name_prefix="client")
        self._running = [self._threads.submit(self._run, random.Random(seed + n)) for n in range(clients)]

    def probe(self, kind: str) -> None:
        """Ask once more, beside the clients, for what a `kind` of worker serves. Returns at once.

        For an encode worker that is an image that is not cached, for a PD worker text, which needs no other.
        """
        question = random.choice(self._pictures) if kind == "encode" else self._questions[0]
        self._threads.submit(self._ask, question, str(uuid.uuid4()), streamed=False)

    def close(self) -> None:
        """Stop asking; returns when every request has ended. Raises what a client raised."""
        self._stop.set()
        for running in self._running:
            running.result()
        self._threads.shutdown()
        self._client.close()

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            question = rng.choice(self._questions)
            salt = f"{rng.getrandbits(64):x}" if rng.random() < _NEW_SALTS else None
            if not self._ask(question, salt, streamed=rng.random() < _STREAMED):
                self._stop.wait(_PAUSE_AFTER_FAILURE_S)

    def _ask(self, question: Question, salt: str | None, *, streamed: bool) -> bool:
        began = time.monotonic()
        try:
            answer = self._answer(question, salt, streamed=streamed)
        except openai.APIError as error:
            with self._lock:
                self.outcomes.failures[describe(error)] += 1
            return False
        finally:
            with self._lock:
                self.outcomes.slowest_s = max(self.outcomes.slowest_s, time.monotonic() - began)
        with self._lock:
            if answer == question.answer:
                self.outcomes.right += 1
            else:
                self.outcomes.wrong.append(f"{answer!r} for {question.answer!r}")
        return True

    def _answer(self, question: Question, salt: str | None, *, streamed: bool) -> str:
        options = {"cache_salt": salt} if salt else {}
        settings = {
            "model": self._model,
            "messages": [question.message],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "extra_body": options,
        }
        if not streamed:
            return self._client.chat.completions.create(**settings).choices[0].message.content or ""
        parts, finished = [], False
        for chunk in self._client.chat.completions.create(stream=True, **settings):
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                finished |= choice.finish_reason is not None
        if not finished:
            raise UnfinishedError
        return "".join(parts)


class UnfinishedError(openai.APIError):
    """A stream that ended without a finish reason: the client can tell that the answer is not whole."""

    def __init__(self) -> None:
        super().__init__("the stream ended without a finish reason", request=None, body=None)  # type: ignore[arg-type]


def describe(error: openai.APIError) -> str:
    """Name a failure as a client can tell it from others."""
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error.body, dict) and "code" in error.body:
        return f"HTTP 200, then an error event with code {error.body['code']}"
    return f"{type(error).__name__}: {error.message[:80]}"
