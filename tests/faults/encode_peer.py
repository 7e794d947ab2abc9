"""A process like an encode worker, and on the same endpoint, whose answers go wrong as a file says.

    python -m tests.faults.encode_peer FAULT_FILE [encode worker option]...

Model, arena and NIXL are the product's own, and so is every answer before it is changed. The fault file
holds one word, read at each call; see `FAULTS` and `EncodePeer.handle`. A second word is a process id.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import click
from dynamo.runtime import Context
from PIL import Image

from trtllm_mm_cache.cache.scope import Selection
from trtllm_mm_cache.cli.options import settings_options
from trtllm_mm_cache.encode import process
from trtllm_mm_cache.encode.server import EncodeServer
from trtllm_mm_cache.runtime.messages import EncodeFault
from trtllm_mm_cache.settings import EncodeSettings
from trtllm_mm_cache.transfer.checksum import checksum

Answer = dict[str, Any]

fault_file: Path


def spoiled(answer: Answer, value: bytes) -> Answer:
    """Put a float32 into the exported embedding itself, so that the checksum agrees."""
    address, nbytes = answer["address"], answer["nbytes"]
    ctypes.memmove(address + nbytes - len(value), value, len(value))
    return answer | {"checksum": checksum(address, nbytes)}


def damaged(answer: Answer) -> Answer:
    """Flip a bit of the NIXL metadata in flight."""
    metadata = bytearray(base64.b64decode(answer["peer"]["metadata"]))
    metadata[len(metadata) // 2] ^= 1
    return answer | {"peer": answer["peer"] | {"metadata": base64.b64encode(metadata).decode()}}


FAULTS: dict[str, Callable[[Answer], Answer]] = {
    "checksum": lambda answer: answer | {"checksum": answer["checksum"] ^ 1},
    "torn-bytes": lambda answer: (ctypes.memset(answer["address"], 7, 64), answer)[1],
    "rows": lambda answer: answer | {"shape": [answer["shape"][0] + 1, answer["shape"][1]]},
    "transposed": lambda answer: answer | {"shape": answer["shape"][::-1]},
    "dtype": lambda answer: answer | {"dtype": "bfloat16"},
    "unknown-dtype": lambda answer: answer | {"dtype": "float31"},
    "nan": lambda answer: spoiled(answer, b"\0\0\xc0\x7f"),
    "infinity": lambda answer: spoiled(answer, b"\0\0\x80\xff"),
    "metadata": damaged,
    "address": lambda answer: answer | {"address": 4096},
    "token": lambda answer: answer | {"token": "x" * 129},
    "fingerprint": lambda answer: answer | {"fingerprint": "0" * 64},
    "no-placeholder": lambda answer: answer | {"placeholder": None},
    "garbage": lambda answer: {"status": "ready", "nonsense": 1},
}
"""What makes an answer wrong."""


class EncodePeer(EncodeServer):
    """The product's encode worker, and what happens to its calls and answers."""

    async def handle(self, payload: Any, context: Context) -> AsyncIterator[Answer]:
        """Answer one call, as the fault file says.

        `silent`: never. `held`: when the file says otherwise. `late`: with its work done, and then held on
        the way. `empty`: with nothing. `busy`: that its queue
        is full. `other-image`: with the embedding of an image of another size, all of it consistent.
        `timed-out`: with an export that is released and overwritten before it can be READ. `killed`: by being
        killed. `frozen`: by standing still. `frozen-after`, `killed-after`: the same, with the answer sent.
        """
        fault, pid, *_ = [*fault_file.read_text().split(), "0"]
        print(f"called: {fault}", flush=True)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "silent":
            await context.async_killed_or_stopped()
            return
        while fault == "held" and fault_file.read_text().startswith("held"):
            await asyncio.sleep(0.02)
        if fault == "empty":
            return
        if fault == "busy":
            yield EncodeFault(code="encode_overloaded", message="the queue is full").model_dump()
            return
        if fault == "other-image":
            payload = payload | {"media": _another_image()}
        async for answer in super().handle(payload, context):
            while fault == "late" and fault_file.read_text().startswith("late"):
                await asyncio.sleep(0.02)
            if fault == "timed-out":
                self._exporter.release(answer["token"])
                self._pipeline.drop(Selection(key=answer["key"]))
                ctypes.memset(answer["address"], 1, answer["nbytes"])
            if fault.endswith("-after"):
                number = signal.SIGSTOP if fault == "frozen-after" else signal.SIGKILL
                asyncio.get_running_loop().call_later(0.01, os.kill, int(pid) or os.getpid(), number)
            yield FAULTS[fault](answer) if fault in FAULTS else answer


def _another_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 224)).save(buffer, "PNG")
    return buffer.getvalue()


@click.command()
@settings_options(EncodeSettings)
def main(settings: EncodeSettings) -> None:
    """Run the product's encode worker with the peer in its place."""
    process.EncodeServer = EncodePeer  # type: ignore[misc]
    process.run_encode_worker(settings)


if __name__ == "__main__":
    fault_file = Path(sys.argv.pop(1))
    main()
