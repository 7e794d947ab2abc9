"""From chat messages to the prompt, as the model's own processor makes it: one placeholder for each image.

The frontend renders and tokenises; an engine expands the placeholders afterwards. What the processor of
Hugging Face does with the same messages (`apply_chat_template(..., tokenize=True)`) is the measure, for
text and tokens:

- The template is the processor's where it has one of its own, else the tokenizer's.
- The text is tokenised as a whole: cut at special tokens, some tokenizers put a space into each piece.
- The tokenizer adds its own special tokens (beginning of sequence), unless the template wrote that token
  itself. LLaVA's templates leave it to the tokenizer, and the models were trained with it.

What a client writes never becomes a control token: it is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer

from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.engines.message_form import Message, MessageForm, count_images, read_messages, texts_of
from trtllm_mm_cache.errors import ConfigurationError, InvalidRequestError, PlaceholderMismatchError

_CANNOT_RENDER = "it cannot render these messages, their roles or their order"


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt: its text, and the tokens that the model's tokenizer makes of it.

    `token_ids` may begin with a token that `text` does not show: the one before every sequence.
    """

    text: str
    token_ids: list[int]


class PromptRenderer:
    """Renders and tokenises for one model. Thread-safe: the tokenizer is used in one way only."""

    def __init__(self, tokenizer: Any, template: str | dict[str, str], image_token: str) -> None:
        """`template` is one for all, or several by name ("default", "tool_use")."""
        self._tokenizer = tokenizer
        self._templates = {"default": template} if isinstance(template, str) else template
        self._image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self._control = _control_tokens(tokenizer, image_token)
        self._reserved_names = frozenset(
            (*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map)
        ) | {"messages", "conversation"}
        self._form = MessageForm(self._apply, _placeholder(tokenizer, image_token), image_token)

    @classmethod
    def from_model(cls, model_path: Path | str) -> PromptRenderer:
        """Read a model directory; no weights. Blocking: about a second with the import of transformers.

        Raises `ConfigurationError` when the tokenizer cannot be read or there is no chat template.
        """
        directory = Path(model_path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            template = _processors_template(directory) or tokenizer.chat_template
        except (OSError, ValueError, AttributeError, ImportError) as error:
            line = str(error).strip().partition("\n")[0]
            raise ConfigurationError(f"the model's tokenizer cannot be used: {line}") from error
        if not template:
            raise ConfigurationError(
                "the model has no chat template: put a chat_template.jinja into its directory"
            )
        # Gemma 3's processor takes the token that opens an image for its placeholder.
        token_id = getattr(config, "boi_token_index", None) if config.model_type == "gemma3" else None
        token_id = token_id or getattr(config, "image_token_id", None)
        if token_id is None:
            raise ConfigurationError(f"a model of type {config.model_type!r} takes no images")
        return cls(tokenizer, template, tokenizer.convert_ids_to_tokens(token_id))

    @property
    def backend(self) -> Any:
        """The tokenizer, as one of the tokenizers library."""
        return self._tokenizer.backend_tokenizer

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> RenderedPrompt:
        """Return the prompt of OpenAI's `messages`, whose contents are texts or parts (text, image_url).

        No URL of an image is read. Blocking: as long as the text takes to tokenise, so bound it before.
        Raises `InvalidRequestError` for what the template refuses, for a control token in a text and for a
        malformed message; `PlaceholderMismatchError` when the template leaves out an image.
        """
        read = read_messages(messages)
        variables = dict(chat_template_kwargs or {})
        self._check_names(variables)
        self._check_texts(read, tools, variables)
        try:
            text = self._apply(
                self._form.fit(read),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except Exception as error:
            reason = _reason(error)
            raise InvalidRequestError(f"the model's chat template refuses the messages: {reason}") from error
        prompt = self.tokenize(text)
        self._check_images(prompt, count_images(read))
        return prompt

    def tokenize(self, text: str) -> RenderedPrompt:
        """Return a prompt that is complete already, as the model's processor tokenises it."""
        beginning = self._tokenizer.bos_token
        has_beginning = beginning is not None and text.startswith(beginning)
        token_ids = self._tokenizer(text, add_special_tokens=not has_beginning)["input_ids"]
        return RenderedPrompt(text, list(token_ids))

    def _apply(self, messages: list[Message], tools: list[Any] | None = None, **options: Any) -> str:
        several = self._templates
        name = "tool_use" if tools and "tool_use" in several else "default"
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=several[name], tokenize=False, **options
            )
        )

    def _check_names(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in self._reserved_names:
                raise InvalidRequestError(f"chat_template_kwargs.{name} is not for a request to set")

    def _check_texts(self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> None:
        parts = {f"messages[{index}]": [message, texts_of(message)] for index, message in enumerate(messages)}
        for where, value in {**parts, "tools": tools, "chat_template_kwargs": variables}.items():
            for text in _strings(value):
                if found := self._control.search(text):
                    raise InvalidRequestError(
                        f"{where} holds {found[0]}, a control token of this model, which a text must not "
                        "become: write it otherwise, for example with a space inside"
                    )

    def _check_images(self, prompt: RenderedPrompt, images: int) -> None:
        found = prompt.token_ids.count(self._image_token_id)
        if found != images:
            raise PlaceholderMismatchError(
                f"the model's chat template makes {found} image placeholders of {images} images: it may not "
                "take images in messages of every role, or at this place"
            )


def _reason(error: Exception) -> str:
    """Return why a template refuses: in its author's words where it does so on purpose."""
    if type(error) is TemplateError and error.message:
        return error.message.partition("\n")[0][:200]
    return fit_for_client(error, _CANNOT_RENDER)


def _processors_template(directory: Path) -> str | dict[str, str] | None:
    """Return a template that the processor has and the tokenizer does not read, in the processor's order.

    A file chat_template.jinja, which is what models come with now, the tokenizer reads too.
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = directory / name
        if path.is_file():
            template = json.loads(path.read_bytes()).get("chat_template")
            if template:
                return template  # type: ignore[no-any-return]
    return None


def _placeholder(tokenizer: Any, image_token: str) -> str:
    """Return what stands for an image in plain text: Qwen's tokens stand between two markers."""
    markers = ("<|vision_start|>", "<|vision_end|>")
    if image_token == "<|image_pad|>" and all(  # noqa: S105 - a token of text
        marker in tokenizer.get_vocab() for marker in markers
    ):
        return image_token.join(markers)
    return image_token


def _control_tokens(tokenizer: Any, image_token: str) -> re.Pattern[str]:
    """Return what finds a control token: all that the tokenizer calls special, and the media's."""
    names = {image_token, getattr(tokenizer, "image_token", None), getattr(tokenizer, "video_token", None)}
    added = tokenizer.added_tokens_decoder.values()
    names |= {token.content for token in added if token.special and not token.content.isspace()}
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, names of fields included, however deep."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            left += each
