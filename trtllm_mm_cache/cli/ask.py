"""`trtllm-mm-cache ask`: one question to a running server, with the official OpenAI client."""

from __future__ import annotations

import contextlib
import ipaddress
import mimetypes
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import openai
import pybase64

from trtllm_mm_cache.errors import ConfigurationError, MmCacheError
from trtllm_mm_cache.settings import AskSettings

if TYPE_CHECKING:
    import httpx2


class AskError(MmCacheError):
    """The server could not be asked, or answered with an error."""

    code = "ask_failed"


def ask_server(images: Sequence[str], question: str, settings: AskSettings) -> None:
    """Send `question` about `images`, print the answer as it streams, then the time to first token.

    The answer goes to standard output, the timing to standard error. Raises `AskError`, and
    `ConfigurationError` when the question is an image.
    """
    _check_question(question)
    content: list[Any] = [{"type": "image_url", "image_url": {"url": _image_url(image)}} for image in images]
    content.append({"type": "text", "text": question})
    try:
        with _client(settings) as client:
            name = settings.model or _first_model(client)
            started = time.perf_counter()
            stream = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": content}],
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                stream=True,
            )
            first = _print_stream(stream)
    except openai.APIConnectionError as error:
        raise AskError(
            f"no server answers at {settings.base_url}; start one with launch/disagg_e_pd.sh, or name "
            "another with --url or DYN_HTTP_PORT"
        ) from error
    except openai.APIStatusError as error:
        raise _refused(error.status_code, _server_message(error)) from error
    except openai.APIError as error:  # an event in a stream that had begun
        raise _refused(error.code or "an error", error.message) from error
    total = time.perf_counter() - started
    if first is None:
        print(f"[no token came; {total:.2f} s]", file=sys.stderr)
    else:
        print(f"[first token after {first - started:.2f} s, all after {total:.2f} s]", file=sys.stderr)


def _print_stream(stream: Iterator[Any]) -> float | None:
    """Print deltas as they come; return when the first token arrived, or None."""
    first: float | None = None
    for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter()
                print(_printable(choice.delta.content), end="", flush=True)
    print()
    return first


def _printable(text: str) -> str:
    """Replace control characters: what a model says must not be able to steer the terminal."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def _check_question(question: str) -> None:
    if question.startswith(("http://", "https://", "data:")) or Path(question).is_file():
        raise ConfigurationError(
            f"the question is missing: '{_shortened(question)}' is an image. For example: ask "
            f'{_shortened(question)} "What is this?"'
        )


def _client(settings: AskSettings) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=settings.base_url,
        api_key="not-needed",
        timeout=settings.timeout_s,
        max_retries=0,
        http_client=_http_client(settings.base_url),
    )


def _http_client(url: str) -> httpx2.Client | None:
    """Return a client that uses no proxy of the environment for a server on this machine; else None."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    return openai.DefaultHttpxClient(trust_env=False) if host == "localhost" else None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _first_model(client: openai.OpenAI) -> str:
    models = client.models.list().data
    if not models:
        raise AskError("the server serves no model yet; wait until the PD worker is ready")
    return models[0].id


def _image_url(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    path = Path(image)
    try:
        body = path.read_bytes()
    except OSError as error:
        raise AskError(f"cannot read {path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{pybase64.b64encode(body).decode()}"


def _refused(status: object, message: str) -> AskError:
    """Return what to tell the user; a 503 may pass by itself."""
    text = f"the server answered {status}: {message}"
    if str(status) == "503":
        text += ". If asking again in a moment does not help, the workers' logs say why"
    return AskError(text)


def _server_message(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        return str(body.get("message", body))
    return str(body or error.message)
