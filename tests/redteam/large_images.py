"""Clients that send large images, all of them new, beside those that ask about a cached one or send text."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from PIL import Image

from tests.e2e.stack import new_image, png
from tests.services import anonymous_bytes

_TIMEOUT_S = 120.0
_PAUSE_S = 0.2

Parts = Sequence[bytes]


class LargeImages:
    """Counts what came of each kind of request: `large`, `hit` and `text`, by status.

    The large image is noise of `side` squared pixels, under a salt of its own each time; all clients send it
    from the same memory.
    """

    def __init__(self, url: str, model: str, side: int) -> None:
        self.outcomes: dict[str, Counter[int]] = {"large": Counter(), "hit": Counter(), "text": Counter()}
        self._url = urlsplit(url)
        self._model = model
        self._small = base64.b64encode(png(new_image()))
        self._large = base64.b64encode(_noise(side))
        self._lock = threading.Lock()

    @property
    def file_bytes(self) -> int:
        """Size of the large image's file."""
        return len(self._large) * 3 // 4

    def warm(self) -> None:
        """Have the small image cached."""
        status = self._post(self._about(self._small, "hit"))
        assert status == 200, f"the small image was answered {status}"

    def run(self, clients: int, going: Callable[[int], bool]) -> None:
        """Send large images from `clients` threads and the others from one each, while `going(done)`.

        `done` is how many large ones have ended. Raises what a client raised.
        """
        makes: list[tuple[str, Callable[[], Parts]]] = [
            ("hit", lambda: self._about(self._small, "hit")),
            ("text", lambda: self._about(None, "text")),
            *[("large", lambda: self._about(self._large, str(uuid.uuid4())))] * clients,
        ]
        with ThreadPoolExecutor(len(makes)) as threads:
            for running in [threads.submit(self._client, kind, make, going) for kind, make in makes]:
                running.result()

    def _client(self, kind: str, make: Callable[[], Parts], going: Callable[[int], bool]) -> None:
        while going(self.outcomes["large"].total()):
            status = self._post(make())
            with self._lock:
                self.outcomes[kind][status] += 1
            if status != 200:
                time.sleep(_PAUSE_S)  # as a client that was told to retry does

    def _about(self, image: bytes | None, salt: str) -> Parts:
        content: list[object] = [{"type": "text", "text": "What is here?"}]
        if image is not None:
            url = "data:image/png;base64,@@"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 4,
            "temperature": 0,
            "cache_salt": salt,
        }
        start, _, end = json.dumps(body).encode().partition(b"@@")
        return [start] if image is None else [start, image, end]

    def _post(self, parts: Parts) -> int:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=_TIMEOUT_S)
        length = str(sum(map(len, parts)))
        headers = {"Content-Type": "application/json", "Content-Length": length}
        try:
            connection.request("POST", self._url.path.rstrip("/") + "/chat/completions", iter(parts), headers)
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()


class PeakMemory:
    """The most anonymous memory of processes, by their ids, while it is open: looked at every 20 ms."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.before = {pid: anonymous_bytes(pid) for pid in pids}
        self.peak = dict(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def grown(self, pid: int) -> int:
        """Return by how many bytes a process was larger than at the beginning."""
        return self.peak[pid] - self.before[pid]

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for pid in self.peak:
                self.peak[pid] = max(self.peak[pid], anonymous_bytes(pid))


def _noise(side: int) -> bytes:
    buffer = io.BytesIO()
    pixels = random.Random(side).randbytes(3 * side * side)
    Image.frombytes("RGB", (side, side), pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
