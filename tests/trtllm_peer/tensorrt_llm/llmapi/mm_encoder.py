"""`tensorrt_llm/llmapi/mm_encoder.py`, 1.2: `MultimodalEncoder`; its output's form as of 1.3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.process import ExecutorProcess
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.inputs import create_input_processor
from tensorrt_llm.llmapi.llm_args import check_arguments


class MultimodalEncoder:
    """The vision tower, in a process of its own."""

    def __init__(
        self,
        model: str | Path,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        **kwargs: Any,
    ) -> None:
        del trust_remote_code, tensor_parallel_size, dtype
        check_arguments(kwargs)
        self._executor: ExecutorProcess | None = ExecutorProcess("vision", str(model))
        self.input_processor = create_input_processor(model)
        self._executor.wait_until_ready()

    def generate(self, inputs: Any, use_tqdm: bool = True) -> RequestOutput | list[RequestOutput]:
        """Encode one input or a list of them; raises what fails."""
        del use_tqdm
        if not isinstance(inputs, list):
            return self.generate_async(inputs).result()
        return [future.result() for future in [self.generate_async(one) for one in inputs]]

    def generate_async(self, inputs: dict[str, Any], sampling_params: Any = None) -> RequestOutput:
        del sampling_params
        if self._executor is None:
            raise RuntimeError("LLM is shutting down")
        images = inputs["multi_modal_data"]["image"]
        placeholder = self.input_processor.config.image_token_id
        token_ids = self.input_processor.tokenizer(inputs["prompt"]).input_ids
        assert token_ids.count(placeholder) == len(images), "one placeholder an image"
        request = {"token_ids": token_ids, "images": images}
        return _EncoderOutput.of(self._executor.submit(request, token_ids))

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None


class _EncoderOutput(RequestOutput):
    """Turns the executor's handles into `DisaggregatedParams` when they arrive."""

    @classmethod
    def of(cls, output: RequestOutput) -> _EncoderOutput:
        output.__class__ = cls
        assert isinstance(output, cls)
        return output

    def _handle(self, response: dict[str, Any]) -> None:
        super()._handle(response)
        self.disaggregated_params = DisaggregatedParams(**response["encoded"])
