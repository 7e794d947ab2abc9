"""Chat messages in the form that a model's template takes.

OpenAI's API has a message's content as a string or as a list of parts; templates take one or the other, or
both. A template that expects the other form says nothing: LLaVA's drops a string, others print a list as
Python writes it. So each template is tried once for each role, and a message whose form it does not take
gets the other one. A form that it does take is kept as the client wrote it, since that is what the model's
own processor renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trtllm_mm_cache.errors import InvalidRequestError

Message = dict[str, Any]
Render = Callable[[list[Message]], str]
"""Renders messages; raises whatever the template raises."""

IMAGE_PARTS = ("image", "image_url")
_PROBE, _FILLER = "zq", "xv"
_CONVERSATIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "user": ((), ()),
    "system": ((), ("user",)),
    "assistant": (("user",), ("user",)),
}
"""The roles of messages before and after the one that is tried, by its role."""


class MessageForm:
    """What one template takes. Thread-safe: nothing changes after the constructor.

    `placeholder` is what stands for an image in a content of text, and `image_token` the token in it.
    """

    def __init__(self, render: Render, placeholder: str, image_token: str) -> None:
        self._render = render
        self._placeholder = placeholder
        self._image_token = image_token
        self._strings = {role: self._takes_string(role) for role in _CONVERSATIONS}
        self._lists = {role: self._takes_list(role) for role in _CONVERSATIONS}
        self._images = {role: self._takes_images(role) for role in _CONVERSATIONS}

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """Return what `read_messages` returned in the template's form."""
        return [
            {**message, "content": self._fit_content(message["role"], message["content"])}
            if "content" in message
            else message
            for message in messages
        ]

    def _fit_content(self, role: str, content: str | list[Message]) -> str | list[Message]:
        strings, lists = self._strings.get(role, True), self._lists.get(role, False)
        if isinstance(content, str):
            return content if strings or not lists else [{"type": "text", "text": content}]
        has_images = any(part["type"] == "image" for part in content)
        takes_it = self._images.get(role, False) if has_images else lists
        if takes_it or not strings:
            return content
        # Where they stood, one a line: vLLM joins likewise, though it puts all images first.
        return "\n".join(self._placeholder if part["type"] == "image" else part["text"] for part in content)

    def _takes_string(self, role: str) -> bool:
        return _PROBE in self._try(role, _PROBE)

    def _takes_list(self, role: str) -> bool:
        text = self._try(role, [{"type": "text", "text": _PROBE}])
        return _PROBE in text and "'type'" not in text

    def _takes_images(self, role: str) -> bool:
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        text = self._try(role, parts)
        return self._lists[role] and _PROBE in text and text.count(self._image_token) == 1

    def _try(self, role: str, content: str | list[Message]) -> str:
        """Return a conversation with a message of `role`, or "" when the template refuses it."""
        before, after = _CONVERSATIONS[role]
        fillers: list[str | list[Message]] = [_FILLER, [{"type": "text", "text": _FILLER}]]
        for filler in fillers:
            messages = [{"role": other, "content": filler} for other in before]
            messages.append({"role": role, "content": content})
            messages += [{"role": other, "content": filler} for other in after]
            try:
                return self._render(messages)
            except Exception:  # noqa: BLE001, S112 - a template may raise anything; the question is whether
                continue
        return ""


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return new messages as templates read them: no field that is None, no URL, `{"type": "image"}` for an
    image, and the arguments of tool calls as objects.

    Raises `InvalidRequestError` that names the field.
    """
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not _is_name(message.get("role")):
            raise InvalidRequestError(f"{where} must be a message with a role")
        plain = {name: value for name, value in message.items() if value is not None}
        if "content" in plain:
            plain["content"] = _content(plain["content"], f"{where}.content")
        if "tool_calls" in plain:
            plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
        read.append(plain)
    return read


def count_images(messages: Sequence[Message]) -> int:
    """Return how many images there are in what `read_messages` returned."""
    contents = [message.get("content") for message in messages]
    return sum(part["type"] == "image" for parts in contents if isinstance(parts, list) for part in parts)


def _is_name(role: Any) -> bool:
    """Whether `role` is a word: templates put it between control tokens, which it must not complete."""
    return isinstance(role, str) and role.isidentifier()


def texts_of(message: Mapping[str, Any]) -> str:
    """Return the texts of a message's content as a template may put them: one after the other."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _content(content: Any, where: str) -> str | list[Message]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where} must be a text or a list of parts")
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS:
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise InvalidRequestError(
                f"{where}[{index}] must be a part of type text, with a text, or of type image_url"
            )
    return parts


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Return the calls with their arguments as objects: the API has JSON text, templates write the JSON."""
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{where} must be a list")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequestError(f"{where}[{index}].function must be an object")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError(f"{where}[{index}].function.arguments must be JSON") from error
        read.append({**call, "function": {**function, "arguments": arguments or {}}})
    return read
