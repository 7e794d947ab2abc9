"""The PD side: prompts and embeddings to tokens with vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import uuid
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_mm_cache.cache.entry import EmbeddingMetadata
from trtllm_mm_cache.engines.base import GenerationRequest, ItemDescription, LeasedEmbedding, TokenDelta
from trtllm_mm_cache.engines.checks import fit_for_client
from trtllm_mm_cache.engines.fingerprint import model_fingerprint
from trtllm_mm_cache.engines.huggingface.embedding_check import EmbeddingCheck
from trtllm_mm_cache.engines.huggingface.layout import FeatureLayout
from trtllm_mm_cache.engines.huggingface.model_files import load_processor, read_config
from trtllm_mm_cache.engines.huggingface.prompt import PromptExpander
from trtllm_mm_cache.engines.leaving import EndingRequests
from trtllm_mm_cache.engines.left_files import files_made, remove_files, write_down
from trtllm_mm_cache.engines.vllm.adapters import check_adapters
from trtllm_mm_cache.engines.vllm.outputs import deltas_of, ended_by_stop_string, prompt_logprobs_of
from trtllm_mm_cache.engines.vllm.prepare import EngineLimits, PreparedRequest, RequestPreparer
from trtllm_mm_cache.engines.vllm.settings import VllmEngineArgs
from trtllm_mm_cache.engines.vllm.support import Tower, check_architecture, model_type_of, start_engine
from trtllm_mm_cache.errors import (
    ConfigurationError,
    EngineLostError,
    GenerationError,
    InvalidRequestError,
)
from trtllm_mm_cache.threads import in_thread

logger = logging.getLogger(__name__)

ENCODE_WORKERS = Tower()
_LOOK_S = 0.25


class VllmGenerator:
    """`Generator` over `AsyncLLM`, with embeddings handed over as handles into the arena.

    vLLM schedules requests itself; they run together. For use from one event loop.
    """

    def __init__(self, model_path: Path, args: VllmEngineArgs, tower: Tower = ENCODE_WORKERS) -> None:
        """Load the model. Blocking: minutes. Raises `ConfigurationError`."""
        check_architecture(model_type_of(model_path))
        config, architecture = read_config(model_path)
        dtype = args.resolved_dtype(model_path)
        self._fingerprint = _fingerprint(model_path, args, dtype, tower)
        layout = FeatureLayout.of(config, architecture, getattr(torch, dtype))
        expander = PromptExpander(load_processor(model_path, config), config)
        self._check = EmbeddingCheck(architecture, layout, expander)
        self._ending = EndingRequests()
        check_adapters(args.lora_modules, args.max_lora_rank)
        self._folders = dict(args.lora_modules)
        self._adapters: dict[str, Any] = {}
        self._epoch = 0
        before = files_made()
        self._llm: Any = start_engine(model_path, args, tower)
        self._files = files_made() - before
        write_down(self._files)
        loaded = self._llm.vllm_config
        limits = EngineLimits(
            context=min(loaded.model_config.max_model_len, args.max_model_len or sys.maxsize),
            rows=self._llm.input_processor.mm_encoder_cache_size,
            vocabulary=loaded.model_config.get_vocab_size(),
        )
        self._prepare = RequestPreparer(architecture, layout, expander, limits)

    @property
    def fingerprint(self) -> str:
        """See `Generator.fingerprint`: of transformers' tower, whose embeddings vLLM gets, or of its own."""
        return self._fingerprint

    async def load_adapters(self) -> tuple[str, ...]:
        """See `Generator.load_adapters`. vLLM would otherwise load each at its first request, in a step."""
        from vllm.lora.request import LoRARequest

        for name, folder in self._folders.items():
            number = len(self._adapters) + 1
            adapter = LoRARequest(name, number, str(folder.absolute()))
            try:
                await self._llm.add_lora(adapter)
                unplaced = await self._llm.collective_rpc("modules_without_place", args=(number,))
            except Exception as error:  # what a worker raises comes as a bare one
                raise ConfigurationError(f"vLLM cannot load the adapter {name!r}: {error}") from error
            # With a pipeline each worker has some of the layers.
            if missing := sorted(set.intersection(*map(set, unplaced))):
                raise ConfigurationError(
                    f"lora_modules: the adapter {name!r} was trained on another model: it has weights of "
                    f"{len(missing)} modules that vLLM's model has not, such as {missing[0]}"
                )
            self._adapters[name] = adapter
        return tuple(self._adapters)

    def variant(self, image_count: int) -> str:
        """Return "": no architecture that is served here encodes an image otherwise beside others."""
        del image_count
        return ""

    def check_embedding(
        self, item: ItemDescription, shape: tuple[int, int], dtype: torch.dtype, metadata: EmbeddingMetadata
    ) -> None:
        """See `Generator.check_embedding`."""
        self._check(item, shape, dtype, metadata)

    async def generate(
        self, request: GenerationRequest, leases: Sequence[LeasedEmbedding]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Stream tokens; see `Generator.generate`.

        The leases are held by clones of this generator's own until no worker of vLLM reads them any more.
        Closing the iterator aborts the request and waits for that, at most 10 seconds; what then still
        runs keeps its leases in the background. Raises `GenerationError` when the engine fails on the
        request, `EngineLostError` when its processes have ended.
        """
        epoch = self._epoch
        prepared = await in_thread(lambda: self._prepare(request, leases, epoch), undo=_release)
        # vLLM aborts by this name, and a client may send one twice.
        name = f"{request.request_id}-{uuid.uuid4().hex}"
        finished = ended_here = False
        asked, of_prompt = request.sampling, request.sampling.prompt_logprobs
        try:
            outputs_of = self._outputs(name, prepared, self._adapter(request.lora_name))
            async with contextlib.aclosing(outputs_of) as outputs:
                async for output in outputs:
                    # An answer that this process ended may still be computed, preempted and loaded again.
                    ended_here |= ended_by_stop_string(output)
                    finished = output.finished and not ended_here
                    told = None if of_prompt is None else prompt_logprobs_of(output, of_prompt)
                    if told is not None:
                        of_prompt = None  # of several choices each may have them
                    for delta in deltas_of(output, asked.logprobs, told):
                        yield delta
        except GenerationError:
            # vLLM may hold zeros under these identifiers: no later request is to find them.
            self._epoch += 1
            raise
        finally:
            await self._end(name, prepared, finished=finished)

    async def failed(self) -> None:
        """See `Generator.failed`: EngineCore or a worker has ended."""
        while self._llm is None or not self._llm.errored:  # noqa: ASYNC110 - vLLM has no event
            await asyncio.sleep(_LOOK_S)
        raise _lost()

    async def close(self) -> None:
        """Abort what runs, stop the engine's processes and free the model."""
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
            remove_files(self._files)
        await self._ending.close()

    def _adapter(self, name: str | None) -> Any:
        """Return what vLLM is told of an adapter; None for the base model."""
        if name is not None and name not in self._adapters:
            raise InvalidRequestError("lora_name: this worker has no adapter of this name")
        return None if name is None else self._adapters[name]

    async def _outputs(self, name: str, prepared: PreparedRequest, adapter: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._llm is None:
            raise _lost()
        try:
            async with contextlib.aclosing(
                self._llm.generate(prepared.prompt, prepared.sampling, name, lora_request=adapter)
            ) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise _lost() from error
        except (VLLMClientError, ValueError) as error:
            reason = fit_for_client(error, "its parameters or its length do not fit the engine")
            raise InvalidRequestError(f"vLLM refuses the request: {reason}") from error
        except (RuntimeError, AssertionError, TypeError) as error:
            raise GenerationError("vLLM failed on the request; see the log") from error

    async def _end(self, name: str, prepared: PreparedRequest, *, finished: bool) -> None:
        """Release what the handles point into, once no worker reads it any more."""
        if (finished and prepared.settled) or self._llm is None:
            _release(prepared)
            return
        await self._ending.end(self._abort(name, prepared))

    async def _abort(self, name: str, prepared: PreparedRequest) -> None:
        """Abort a request, and release its leases when the steps that run have ended.

        An abort is a message: it returns while a worker may be in the middle of a load. The next message to
        EngineCore is answered by each worker after all steps before it, however many are in flight.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.abort(name)
            if prepared.leases:
                await self._llm.collective_rpc("wait_for_embedding_loads")
        except EngineDeadError:
            logger.info("an aborted request ended with its engine")
        except Exception:
            logger.exception("vLLM did not confirm that an aborted request has ended")
        finally:
            _release(prepared)


def _fingerprint(model_path: Path, args: VllmEngineArgs, dtype: str, tower: Tower) -> str:
    if not tower.own:
        return args.fingerprint(model_path)
    import vllm

    engine = f"vllm {vllm.__version__} computing in {dtype}"
    return model_fingerprint(model_path, engine=engine, embedding_dtype=dtype)


def _lost() -> EngineLostError:
    return EngineLostError(
        "vLLM's EngineCore or one of its workers has ended, and this PD worker ends with it, to be started "
        "again; the lines above in its log say why"
    )


def _release(prepared: PreparedRequest) -> None:
    for lease in prepared.leases:
        lease.release()
