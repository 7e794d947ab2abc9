"""A byte-level BPE tokenizer, trained on the spot, that carries a model family's special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import CORPUS

VOCABULARY_SIZE = 640
"""Tokens before the special ones: 256 bytes and 384 merges, all that the corpus can fill."""


def train_tokenizer(
    special_tokens: Sequence[str],
    *,
    named_tokens: dict[str, str],
    chat_template: str,
    bos: str | None,
    eos: str,
    pad: str,
    merge_newlines: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the same in every run.

    `named_tokens` become attributes (`image_token`, `boi_token`, ...), as Hugging Face's processors
    read them. With `bos` the tokenizer puts it before every text, as Llama's and Gemma's do.
    `merge_newlines` lets runs of newlines become one token, as in Gemma's vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_newlines)
    if merge_newlines:
        newlines = pre_tokenizers.Split(pattern="\n", behavior="contiguous")
        words = pre_tokenizers.Split(pattern=" ", behavior="merged_with_next")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newlines, words, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [CORPUS]
    if merge_newlines:
        texts += ["\n" * length for length in (2, 3, 4, 5, 6) for _ in range(4)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
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
