"""Blocks of Python, shell, YAML and JSON are that, and an engine's YAML is what its settings class takes."""

from __future__ import annotations

import ast
import json
import shlex

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tests.docs.documents import Document, Piece, documents
from trtllm_mm_cache.engines.transformers.settings import TransformersEngineArgs
from trtllm_mm_cache.engines.trtllm.settings import TrtllmEncoderArgs, TrtllmLlmArgs

ENGINE_ARGS: tuple[type[BaseModel], ...] = (TransformersEngineArgs, TrtllmEncoderArgs, TrtllmLlmArgs)


def problem_of(block: Piece) -> str | None:
    """Return what is wrong with a block of a known language, or None."""
    try:
        match block.language:
            case "python":
                compile(block.text, block.where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            case "bash" | "sh" | "shell":
                shlex.split(block.text, comments=True)
            case "json":
                json.loads(block.text)
            case "yaml":
                return next(filter(None, map(_engine_problem, yaml.safe_load_all(block.text))), None)
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return str(error)
    return None


def _engine_problem(values: object) -> str | None:
    """Settings of an engine are told by their first key; they must be whole for one of the engines."""
    known = {name for settings in ENGINE_ARGS for name in settings.model_fields}
    if not isinstance(values, dict) or next(iter(values), None) not in known:
        return None
    problems = []
    for settings in ENGINE_ARGS:
        try:
            settings.model_validate(values)
        except ValidationError as error:
            problems.append(f"{settings.__name__}: {error}")
        else:
            return None
    return "\n".join(problems)


@pytest.mark.parametrize("document", documents(), ids=lambda document: str(document.path))
def test_every_block_is_what_it_says(document: Document) -> None:
    found = [(block, problem_of(block)) for block in document.blocks()]
    assert not [f"{block.where}: {problem}" for block, problem in found if problem]


@pytest.mark.parametrize(
    ("language", "text", "problem"),
    [
        ("python", "async with a:\n    await b", None),
        ("python", "async with a\n    await b", "expected ':'"),
        ("bash", "echo 'a\nb' # it's", None),
        ("bash", "echo 'a", "No closing quotation"),
        ("json", '{"a": [1]}', None),
        ("json", "{'a': 1}", "Expecting property name"),
        ("yaml", "kind: Pod\n---\nkind: Service", None),
        ("yaml", "kind: [Pod", "expected ',' or ']'"),
        ("yaml", "max_num_tokens: 8192\nkv_cache_config: {free_gpu_memory_fraction: 0.8}", None),
        ("yaml", "max_num_tokens: 8192\nkv_cache: {free_gpu_memory_fraction: 0.8}", "kv_cache"),
        ("yaml", "device: cpu\ntorch_threads: 0", "torch_threads"),
    ],
)
def test_a_wrong_block_is_found(language: str, text: str, problem: str | None) -> None:
    found = problem_of(Piece(text, "here", language))
    assert found == problem or problem in (found or "")
