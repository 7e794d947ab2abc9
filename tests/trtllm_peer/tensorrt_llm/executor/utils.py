"""`tensorrt_llm/executor/utils.py`, 1.3."""


class RequestError(RuntimeError):
    """A request cannot be served, or has failed; the engine goes on."""
