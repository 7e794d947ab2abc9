"""Fields of OpenAI's API that are not served, with the values that ask for nothing.

Whoever sends one of the values gets what the API promises for it; every other value is refused by the field's
name, because an answer that is not what was asked for is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trtllm_mm_cache.errors import InvalidRequestError

NOT_SERVED: Final = "this server does not serve it; leave it out"

_NOTHING: Final = (None,)
_OFF: Final = (None, False)

# Sent along for the operator of a service; they promise nothing about an answer.
_LABELS: Final = ("user", "metadata", "safety_identifier", "prompt_cache_key")

_UNSERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "best_of": (None, 1),
    "use_beam_search": _OFF,
    "length_penalty": (None, 1),
    "echo": _OFF,
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": _NOTHING,
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": _NOTHING,
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "store": _OFF,
    "moderation": _NOTHING,
    "prompt_cache_retention": (None, "in_memory"),
    "prompt_cache_options": _NOTHING,
    "chat_template": _NOTHING,
    "documents": (None, []),
    "include_stop_str_in_output": _OFF,
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": _NOTHING,
}

# What an assistant's message of an earlier answer holds besides its text; clients send it back as it came.
_EMPTY_IN_MESSAGES: Final = (
    "refusal",
    "annotations",
    "audio",
    "tool_calls",
    "function_call",
    "reasoning_content",
)


def refuse_unserved(fields: dict[str, Any]) -> None:
    """Take fields that ask for nothing out of a request. Raises `InvalidRequestError` for those that do."""
    for name in _LABELS:
        fields.pop(name, None)
    for name, nothing in _UNSERVED.items():
        if name in fields and not _is_one_of(fields.pop(name), nothing):
            raise InvalidRequestError(f"{name}: {NOT_SERVED}")
    messages = fields.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _refuse_in_message(message, f"messages[{index}]")


def _refuse_in_message(message: dict[str, Any], where: str) -> None:
    if message.get("role") in ("tool", "function"):
        raise InvalidRequestError(f"{where}.role: tools are not served; leave such messages out")
    for name in _EMPTY_IN_MESSAGES:
        if message.pop(name, None) not in (None, []):
            raise InvalidRequestError(f"{where}.{name}: {NOT_SERVED}")
    parts = message.get("content")
    for index, part in enumerate(parts if isinstance(parts, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "image_url"):
            raise InvalidRequestError(
                f"{where}.content[{index}].type: {kind[:40]} is not served; text and image_url are"
            )


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    # 1 == True in Python, not in JSON.
    return any(type(value) is type(each) and value == each for each in accepted) or (
        isinstance(value, float) and value in [each for each in accepted if type(each) is int]
    )
