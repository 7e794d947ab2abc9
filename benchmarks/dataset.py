"""Pictures and requests for the benchmarks: the same arguments give the same bytes."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# Words of one token each in a byte-level vocabulary that knows them, and of few in any.
_WORDS = (
    "what",
    "is",
    "the",
    "colour",
    "of",
    "a",
    "big",
    "small",
    "red",
    "circle",
    "left",
    "and",
    "in",
    "it",
)


@dataclass(frozen=True)
class Request:
    """One request: pictures by number, in order, and a text. `repeated`: which of them came before."""

    session: int
    turn: int
    pictures: tuple[int, ...]
    repeated: tuple[bool, ...]
    text: str

    @property
    def is_hit(self) -> bool:
        """Whether every picture came before."""
        return all(self.repeated)


def pooled(count: int, pool: int, words: int) -> list[Request]:
    """Return `count` requests of one picture each over `pool` pictures, each as often as the others.

    The order is random, so the reuse is exactly `1 - pool / count` and does not come in blocks.
    """
    source = random.Random(1)
    pictures = [number % pool for number in range(count)]
    source.shuffle(pictures)
    return list(_requests([(number, 0, (picture,)) for number, picture in enumerate(pictures)], words))


def sliding_window(users: int, turns: int, window: int, words: int) -> list[Request]:
    """Return conversations: in each turn a user shows the last `window` pictures, one of them new.

    All users' first turns come first, then all second ones: a turn does not overtake the one before it while
    fewer than `users` requests are under way.
    """
    return list(
        _requests(
            [
                (user, turn, tuple(user * (turns + window) + turn + place for place in range(window)))
                for turn in range(turns)
                for user in range(users)
            ],
            words,
        )
    )


def _requests(order: Sequence[tuple[int, int, tuple[int, ...]]], words: int) -> Iterator[Request]:
    source = random.Random(2)
    seen: set[int] = set()
    for session, turn, pictures in order:
        text = " ".join(source.choices(_WORDS, k=words))
        yield Request(session, turn, pictures, tuple(picture in seen for picture in pictures), text)
        seen.update(pictures)


def reuse(requests: Sequence[Request]) -> float:
    """Return the share of pictures that came before."""
    repeated = [flag for request in requests for flag in request.repeated]
    return sum(repeated) / len(repeated)


def write_aiperf(
    path: Path, requests: Sequence[Request], *, first_seed: int, width: int, height: int, stand_in: str | None
) -> None:
    """Write AIPerf's `single_turn` JSON lines; picture number n is drawn from the seed `first_seed + n`.

    With `stand_in` that text stands in the place of every picture that came before.
    """
    with path.open("w", encoding="utf-8") as file:
        for place, request in enumerate(requests):
            both = list(zip(request.pictures, request.repeated, strict=True))
            shown = [number for number, came in both if stand_in is None or not came]
            texts = [stand_in or "" for _, came in both if stand_in is not None and came]
            row = {
                "session_id": f"request-{place}",  # AIPerf mixes up lines of one session
                "text": " ".join([*texts, request.text]),
                "images": [data_url(picture(first_seed + number, width, height)) for number in shown],
            }
            file.write(json.dumps(row) + "\n")


def picture(seed: int, width: int, height: int | None = None) -> bytes:
    """Return a JPEG file of blurred patches of colour, of `width` x `height` pixels (default: a square)."""
    patches = random.Random(seed).randbytes(3 * 12 * 12)
    image = Image.frombytes("RGB", (12, 12), patches).resize((width, height or width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def data_url(jpeg: bytes) -> str:
    """Return the file as a data: URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
