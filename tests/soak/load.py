"""What a server meets over hours: questions with known answers among broken, cancelled and large images."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tests.chaos.questions import MAX_TOKENS, Question
from tests.e2e.stack import data_url, image_part, message, new_image, png

_TIMEOUT_S = 60.0
_PAUSE_S = 0.05
_LARGEST_SIDE = 1600


class MixedLoad:
    """Asks from `clients` threads until it is closed; `outcomes` counts by kind of request and what came.

    `wrong` has the answers that were not the right ones. A large image has up to some 7 MB, under a salt of
    its own, so that it is a miss each time.
    """

    def __init__(
        self, url: str, model: str, questions: Sequence[Question], *, clients: int, seed: int
    ) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._url = urlsplit(url)
        self._model = model
        self._questions = questions
        self._large = [_noise(side) for side in range(400, _LARGEST_SIDE + 1, 400)]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(clients, thread_name_prefix="client")
        self._running = [self._threads.submit(self._run, random.Random(seed + n)) for n in range(clients)]

    @property
    def requests(self) -> int:
        """How many have ended."""
        with self._lock:
            return self.outcomes.total()

    def close(self) -> None:
        """Stop asking; returns when every request has ended. Raises what a client raised."""
        self._stop.set()
        for running in self._running:
            running.result()
        self._threads.shutdown()

    def _run(self, rng: random.Random) -> None:
        kinds: dict[str, tuple[int, Callable[[random.Random], str]]] = {
            "question": (6, self._question),
            "new image": (2, self._new_image),
            "large": (1, self._large_image),
            "broken": (2, self._broken),
            "cancelled": (2, self._cancelled),
        }
        weights = [weight for weight, _ in kinds.values()]
        while not self._stop.is_set():
            (kind,) = rng.choices(list(kinds), weights)
            try:
                outcome = kinds[kind][1](rng)
            except OSError as error:
                outcome = type(error).__name__
            with self._lock:
                self.outcomes[kind, outcome] += 1
            if outcome not in ("200", "400", "left"):
                self._stop.wait(_PAUSE_S)

    def _question(self, rng: random.Random) -> str:
        question = rng.choice(self._questions)
        salt = f"{rng.getrandbits(64):x}" if rng.random() < 0.5 else None
        status, answer = self._ask(question.message, MAX_TOKENS, salt)
        if status == 200:
            said = json.loads(answer)["choices"][0]["message"]["content"]
            if said != question.answer:
                self.wrong.append(f"{said!r} for {question.answer!r}")
        return str(status)

    def _new_image(self, rng: random.Random) -> str:
        side = rng.choice((56, 112, 224))
        return str(self._ask(message(new_image(side, side), "What is it?"), 4)[0])

    def _large_image(self, rng: random.Random) -> str:
        return str(self._ask(_about(rng.choice(self._large)), 2, f"{rng.getrandbits(64):x}")[0])

    def _broken(self, rng: random.Random) -> str:
        body = bytearray(png(new_image(64, 64)))
        if rng.random() < 0.5:
            del body[rng.randrange(len(body)) :]
        else:
            body[rng.randrange(8, len(body))] ^= 0xFF
        return str(self._ask(_about(data_url(bytes(body))), 2)[0])

    def _cancelled(self, rng: random.Random) -> str:
        url = rng.choice(self._large) if rng.random() < 0.3 else data_url(png(new_image()))
        connection = self._post(_about(url), 8, f"{rng.getrandbits(64):x}")
        time.sleep(rng.uniform(0, 0.5))  # the moment is what is tried
        connection.close()
        return "left"

    def _ask(self, asked: Any, max_tokens: int, salt: str | None = None) -> tuple[int, bytes]:
        connection = self._post(asked, max_tokens, salt)
        try:
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _post(self, asked: Any, max_tokens: int, salt: str | None) -> http.client.HTTPConnection:
        body = {"model": self._model, "messages": [asked], "max_tokens": max_tokens, "temperature": 0}
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=_TIMEOUT_S)
        text = json.dumps(body | ({"cache_salt": salt} if salt else {}))
        path = self._url.path.rstrip("/") + "/chat/completions"
        connection.request("POST", path, text, {"Content-Type": "application/json"})
        return connection


def _about(url: str) -> Any:
    return {"role": "user", "content": [image_part(url), {"type": "text", "text": "What?"}]}


def _noise(side: int) -> str:
    buffer = io.BytesIO()
    pixels = random.Random(side).randbytes(3 * side * side)
    Image.frombytes("RGB", (side, side), pixels).save(buffer, "PNG", compress_level=0)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
