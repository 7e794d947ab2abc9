"""A process like a PD worker, and on the same endpoint, that answers as the request itself says.

    python -m tests.frontend.pd_peer [PD worker option]...

Discovery, membership and messages are the product's own; instead of an engine it follows the steps between
`<<` and `>>` in the prompt, with `;` between them: see `PdPeer.steps`. While the file that PD_PEER_FULL names
is there, it refuses every request; where the file says "unproven" it does so without its proof, and as if the
request were at fault. It prints what happens to it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import click
from dynamo.runtime import Context
from tokenizers import Tokenizer

from trtllm_mm_cache.cli.options import settings_options
from trtllm_mm_cache.errors import InvalidRequestError, MmCacheError, OverloadedError, from_wire
from trtllm_mm_cache.runtime.connect import endpoint_path, join
from trtllm_mm_cache.runtime.generation import error_message
from trtllm_mm_cache.runtime.presence import serve_present
from trtllm_mm_cache.settings import PdSettings

Message = dict[str, Any]


class PdPeer:
    """Follows the steps of each request."""

    def __init__(self, model: Path, admit: Any) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._admit = admit
        self._full = Path(os.environ["PD_PEER_FULL"])

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[Message]:
        """Answer one request, and print how it ended."""
        print("called", flush=True)
        try:
            proof = self._admit(payload)
            if self._full.exists() and self._full.read_text() == "unproven":
                raise InvalidRequestError("made up")
            yield proof
            if self._full.exists():
                raise OverloadedError("this peer is full")
            async for message in self.steps(payload, context):
                yield message
        except MmCacheError as error:
            yield error_message(error)
        finally:
            print("ended", flush=True)

    async def steps(self, payload: Any, context: Context) -> AsyncIterator[Message]:
        """Yield what the steps say.

        `beat`; `items`; `say TEXT`; `finish`; `error CODE TEXT`; `raise`; `die`; `freeze`; `wait`: until the
        request is stopped.
        """
        found = re.search(r"<<(.*)>>", payload["extra_args"]["formatted_prompt"])
        usage = {"completion_usage": {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 0}}
        for step in found[1].split(";") if found else ["say A cat", "finish"]:
            word, _, rest = step.strip().partition(" ")
            match word:
                case "beat":
                    yield {}
                case "items":
                    yield {"items": {"hits": 1, "misses": 0, "hit_rows": 4}}
                case "say":
                    for token in self._tokenizer.encode(rest).ids:
                        yield {"token_ids": [token], **usage}
                case "finish":
                    yield {"token_ids": [], "finish_reason": "stop", **usage}
                case "error":
                    code, _, text = rest.partition(" ")
                    raise from_wire({"code": code, "message": text})
                case "raise":
                    raise RuntimeError("a defect with /secret/paths")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "wait":
                    await context.async_killed_or_stopped()


async def _serve(settings: PdSettings) -> None:
    deployment = join(settings)
    endpoint = deployment.runtime.endpoint(endpoint_path(settings.endpoint))
    admit = partial(deployment.members.admit, endpoint.connection_id(), required=True)
    peer = PdPeer(Path(settings.model_path), admit)
    print("PD peer ready", flush=True)
    await serve_present(endpoint, peer.handle, deployment.draining)


@click.command()
@settings_options(PdSettings)
def main(settings: PdSettings) -> None:
    """Run the peer."""
    asyncio.run(_serve(settings))


if __name__ == "__main__":
    main()
