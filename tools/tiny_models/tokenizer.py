"""Tokenizers trained on the spot, in the three manners that the model families use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import CORPUS

VOCABULARY_SIZE = 640
"""At most this many tokens before the special ones; the corpus fills about 400."""


def byte_level(*, merge_newlines: bool = False) -> Tokenizer:
    """Return byte-level BPE as GPT-2's and Qwen's.

    `merge_newlines` lets runs of newlines become one token, as in Gemma's vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_newlines)
    texts = [CORPUS]
    if merge_newlines:
        newlines = pre_tokenizers.Split(pattern="\n", behavior="contiguous")
        words = pre_tokenizers.Split(pattern=" ", behavior="merged_with_next")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newlines, words, to_bytes])
        texts += ["\n" * length for length in (2, 3, 4, 5, 6) for _ in range(4)]
    else:
        tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, _trainer(sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


def sentencepiece(*, space_before_every_text: bool) -> Tokenizer:
    """Return BPE over characters with bytes to fall back to, as Llama's: a space is part of its word.

    `space_before_every_text`: a space is put before each piece between special tokens, as in the
    tokenizers of Llama 2's time; else before the first alone.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([CORPUS], _trainer([]))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: position for position, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",  # noqa: S106
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if space_before_every_text:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def complete(
    tokenizer: Tokenizer,
    special_tokens: Sequence[str],
    *,
    named_tokens: dict[str, str],
    chat_template: str,
    bos: str | None,
    eos: str,
    pad: str,
) -> PreTrainedTokenizerFast:
    """Return `tokenizer` with a family's special tokens and chat template.

    `named_tokens` become attributes (`image_token`, `boi_token`, ...), as Hugging Face's processors
    read them. With `bos` the tokenizer puts it before every text, as Llama's and Gemma's do.
    """
    tokenizer.add_special_tokens(list(special_tokens))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_specific_special_tokens=named_tokens,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter.

    Dynamo's frontend reads the template from tokenizer_config.json.
    """
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def _trainer(alphabet: Sequence[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, min_frequency=2, initial_alphabet=list(alphabet), show_progress=False
    )
