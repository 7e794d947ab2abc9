"""Settings of a whole stack on one machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trtllm_mm_cache.settings.base import EngineName, Seconds, constant
from trtllm_mm_cache.settings.frontend import FrontendOptions
from trtllm_mm_cache.settings.workers import PdOptions


class ServeSettings(FrontendOptions, PdOptions):
    """A whole stack on this machine: frontend, encode workers and PD workers, with the options of all.

    What processes must agree on counts for all of them.
    """

    model_path: str | None = Field(
        None,
        description="Model directory, or a name on the Hugging Face hub. Default: the demo model, which "
        "knows drawn cards alone; with TensorRT-LLM llava-hf/llava-v1.6-mistral-7b-hf.",
        json_schema_extra={"env": "MODEL_PATH"},
    )
    engine: EngineName | None = Field(
        None,
        description="Engine that runs the model. Default: `trtllm` where it and a GPU are there, else "
        "`transformers`.",
        json_schema_extra={"env": "ENGINE"},
    )
    extra_engine_args: Path | None = Field(
        None,
        description="YAML file with the PD engine's own settings. Default: configs/MODEL/pd.yaml, with "
        "`vllm` and `sglang` configs/MODEL/ENGINE/pd.yaml.",
        json_schema_extra={"env": "PD_ENGINE_ARGS"},
    )
    encode_engine_args: Path | None = Field(
        None,
        description="The same for the encode engine. Default: encode.yaml in the same folder.",
        json_schema_extra={"env": "ENCODE_ENGINE_ARGS"},
    )
    encode_engine: EngineName | None = Field(
        None,
        description="Engine of the encode workers. Default: the PD workers'; with `vllm` or `sglang` "
        "there, `transformers`.",
        json_schema_extra={"env": "ENCODE_ENGINE"},
    )
    encode_python: Path | None = Field(
        None,
        description="Python that runs the encode workers, where their engine is in another virtual "
        "environment. Default: the one of this command.",
        json_schema_extra={"env": "ENCODE_PYTHON"},
    )
    encode_extra_args: str = Field(
        "",
        description="More options for the encode workers (`trtllm-mm-cache encode --help`), in one text.",
        json_schema_extra={"env": "ENCODE_EXTRA_ARGS"},
    )
    encode_workers: int = Field(
        1, ge=0, le=64, description="How many encode workers.", json_schema_extra={"env": "ENCODE_WORKERS"}
    )
    pd_workers: int = Field(
        1, ge=1, le=64, description="How many PD workers.", json_schema_extra={"env": "PD_WORKERS"}
    )
    pd_ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="Ranks of each PD worker, started by mpirun.",
        json_schema_extra={"env": "PD_RANKS"},
    )
    encode_cuda_visible_devices: str | None = Field(
        None,
        description="GPUs of the encode workers, as in CUDA_VISIBLE_DEVICES. Default: all.",
        json_schema_extra={"env": "ENCODE_CUDA_VISIBLE_DEVICES"},
    )
    pd_cuda_visible_devices: str | None = Field(
        None,
        description="GPUs of the PD workers.",
        json_schema_extra={"env": "PD_CUDA_VISIBLE_DEVICES"},
    )
    run_dir: Path | None = Field(
        None,
        description="Folder for logs, discovery and the secret that the processes share, closed to other "
        "users. Default: .run/TIME-PID.",
        json_schema_extra={"env": "RUN_DIR"},
    )
    drain_timeout_s: Seconds = Field(
        60,
        description="How long each kind of process may take, on SIGTERM or Ctrl-C, to finish what runs.",
        json_schema_extra={"env": "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"},
    )
    no_restart: bool = Field(
        False,
        description="Leave a worker that has ended by itself ended, for tests: everything ends with the "
        "frontend or the last PD worker.",
        json_schema_extra={"env": "MM_CACHE_NO_RESTART"},
    )
    ready_timeout_s: Seconds = constant(
        900, "Downloading a large model, and loading it from a slow disk, take minutes; the log shows a hang."
    )
    restart_most_s: Seconds = constant(30, "Longest wait before a process that keeps ending is tried again.")
    restart_attempts: int = constant(
        5, "Starts in a row that may fail before it is given up: by then it is not chance.", ge=1
    )
    settled_s: Seconds = constant(10, "What served for this long is started again at once when it ends.")
