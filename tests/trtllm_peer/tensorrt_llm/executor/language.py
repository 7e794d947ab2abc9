"""The language half: Hugging Face's model on the tokens, embeddings and positions that were handed over.

Nothing is known here of images, grids or caches: features come from the opened handles, positions from
the mRoPE handles and from nowhere else. Bytes are read twice, before and after the answer, so that a
buffer that was given back too early is an error and not a wrong answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tensorrt_llm._torch.shared_tensor import SharedTensorContainer
from tensorrt_llm.sampling_params import SamplingParams
from trtllm_mm_cache.engines import base
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import read_config
from trtllm_mm_cache.engines.transformers.constraint import ConstraintCompiler
from trtllm_mm_cache.engines.transformers.features import encoder_output
from trtllm_mm_cache.engines.transformers.loading import load_text_half
from trtllm_mm_cache.engines.transformers.sampling import logits_processors
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs


class LanguageModel:
    def __init__(self, model: Path) -> None:
        args = TransformersEngineArgs(device="cpu")
        self._config, self._architecture = read_config(model)
        self._model: Any = load_text_half(model, self._config, self._architecture, args)
        self._model.generation_config = GenerationConfig()
        self._layout = FeatureLayout.of(self._config, self._architecture, torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self._constrain = ConstraintCompiler(tokenizer, (tokenizer.eos_token_id,))
        self._content_of: dict[tuple[int, ...], bytes] = {}

    @torch.no_grad()
    def answer(self, request: dict[str, Any], send: Any, aborted: Any) -> None:
        handles = request.get("handles") or []
        views = [SharedTensorContainer.from_dict(handle).get_local_view() for handle in handles]
        mrope = [
            SharedTensorContainer.from_dict(handle).get_local_view() for handle in request.get("mrope") or ()
        ]
        contents = [_content(tensor) for tensor in (*views, *mrope)]
        self._check_hashes(request.get("hashes") or [], contents)
        constraint = self._constrain(_engine_sampling(request["sampling"]))
        tokens = _Tokens(request, send, aborted, constraint)
        self._generate(request, views, mrope, tokens)
        if contents != [_content(tensor) for tensor in (*views, *mrope)]:
            raise RuntimeError("bytes behind a handle changed before the request had finished")
        del views, mrope
        send({"final": True, **tokens.last, "finish_reason": tokens.reason})

    def _check_hashes(self, hashes: list[list[int]], contents: list[bytes]) -> None:
        """KV blocks are shared by hash, so equal hashes must mean equal embeddings."""
        for item, content in zip(hashes, contents, strict=False):
            if self._content_of.setdefault(tuple(item), content) != content:
                raise RuntimeError("a multimodal hash stands for two different embeddings")

    def _generate(
        self, request: dict[str, Any], views: list[torch.Tensor], mrope: list[torch.Tensor], tokens: _Tokens
    ) -> None:
        sampling: SamplingParams = request["sampling"]
        ids = torch.tensor([request["token_ids"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if views:
            inputs |= {"mm_encoder_outputs": {"image": encoder_output(self._layout, views)}}
        if self._architecture.has_grid:
            inputs["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
            self._model.model.rope_deltas = None
            if views:
                inputs |= self._positions(mrope, ids)
        eos = () if sampling.ignore_eos else (sampling.end_id,)
        self._model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                min_new_tokens=sampling.min_tokens or 0,
                eos_token_id=[token for token in eos if token is not None] or None,
                pad_token_id=0,
                do_sample=False,
            ),
            logits_processor=LogitsProcessorList(
                [
                    tokens.raw,
                    *filter(None, [tokens.constraint]),
                    *logits_processors(_engine_sampling(sampling)),
                ]
            ),
            stopping_criteria=StoppingCriteriaList([tokens]),
        )

    def _positions(self, mrope: list[torch.Tensor], ids: torch.Tensor) -> dict[str, Any]:
        """Make the model take the positions that were handed over."""
        if not mrope:
            raise RuntimeError("this model takes positions with its images, and there are none")
        positions, deltas = mrope
        if positions.shape != (3, 1, ids.shape[1]) or deltas.shape != (1, 1) or deltas.dtype != torch.int32:
            raise RuntimeError(
                f"positions {list(positions.shape)} and deltas {list(deltas.shape)} for {ids.shape[1]} tokens"
            )
        self._model.model.get_rope_index = lambda *_, **__: (positions.clone(), deltas.long().clone())
        # Any grid makes the model ask for positions; its numbers are not looked at.
        return {"image_grid_thw": torch.zeros(1, 3, dtype=torch.long)}


class _Tokens(StoppingCriteria):
    """Sends each new token and says when the answer ends.

    As in the real executor, the response that ends a request brings its last token: that is in `last`.
    """

    def __init__(self, request: dict[str, Any], send: Any, aborted: Any, constraint: Any) -> None:
        self.raw = _Raw()
        self.constraint = constraint
        self._sampling: SamplingParams = request["sampling"]
        self._prompt_tokens = len(request["token_ids"])
        self._send, self._aborted = send, aborted
        self.reason = "length"
        self.last: dict[str, Any] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        answer = input_ids[0, self._prompt_tokens :].tolist()
        if self.constraint is not None:
            self.constraint.take(answer[-1])
        if self._aborted.is_set():
            self.reason = "cancelled"
        else:
            ends = answer[-1] == self._sampling.end_id and not self._sampling.ignore_eos
            ends |= self.constraint is not None and self.constraint.ended
            if ends or any(answer[-len(word) :] == word for word in self._sampling.stop_words()):
                self.reason = "stop"
            new: dict[str, Any] = {"token_ids": answer[-1:]}
            if self._sampling.logprobs is not None:
                new["logprobs"] = [self.raw.top(answer[-1], self._sampling.logprobs)]
            if self.reason == "stop" or len(answer) == self._sampling.max_tokens:
                self.last = new
            else:
                self._send({"final": False, **new})
        return torch.full((1,), self.reason != "length")


class _Raw(LogitsProcessor):
    """`LogprobMode.RAW`: of the logits before anything is done to them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = torch.log_softmax(scores[0].double(), -1)
        return scores

    def top(self, token: int, count: int) -> dict[int, tuple[float, int]]:
        """The best `count`, and the sampled token behind them if it is not one of them; ranks from 1."""
        order = self._logprobs.argsort(descending=True).tolist()
        ids = order[:count] if token in order[:count] else [*order[:count], token]
        return {one: (float(self._logprobs[one]), order.index(one) + 1) for one in ids}


def _engine_sampling(sampling: SamplingParams) -> base.SamplingParams:
    guide = sampling.guided_decoding
    constraint = None
    if guide is not None:
        kind, text = ("json_schema", guide.json) if guide.json else ("regex", guide.regex)
        constraint = base.Constraint(kind, str(text))
    if sampling.greedy:
        return base.SamplingParams(constraint=constraint)
    return base.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        constraint=constraint,
    )


def _content(tensor: torch.Tensor) -> bytes:
    return blake3(tensor.contiguous().view(torch.uint8).numpy()).digest()
