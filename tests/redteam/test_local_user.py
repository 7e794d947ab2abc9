"""Another user of the machine: calls nothing, reads nothing, drops nothing."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cards import Deal
from tests.e2e.stack import REPOSITORY, new_image, png
from tests.redteam.deployment import ARGS, ENDPOINTS, MODEL, Deployment, answers, caller
from tests.redteam.stranger import NOBODY
from trtllm_mm_cache.cache.key import content_digest, embedding_key
from trtllm_mm_cache.engines.registry import load_engine
from trtllm_mm_cache.media import pixels_fingerprint
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.runtime.messages import EncodeReady, EncodeRequest, parse_answer
from trtllm_mm_cache.settings import ImageLimits
from trtllm_mm_cache.transfer import Export

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
    pytest.mark.skipif(
        not all(folder.stat().st_mode & 0o001 for folder in Path(sys.prefix).resolve().parents),
        reason=f"another user cannot import the package from {sys.prefix}: a folder above it is closed",
    ),
]


@pytest.fixture
def copied_discovery(deployment: Deployment) -> Iterator[Path]:
    """Everything in the discovery folder but the secret, where nobody can read and write."""
    folder = Path(tempfile.mkdtemp(prefix="stranger-"))
    shutil.copytree(deployment.discovery, folder, dirs_exist_ok=True, ignore=lambda *_: ["secret"])
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700)
        os.chown(path, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def stranger(discovery: Path, *tries: str, **told: Any) -> dict[str, Any]:
    """Let nobody try, and return what came of it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.redteam.stranger", json.dumps({"tries": tries, **told})],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "DYN_FILE_KV": str(discovery),
            "DYN_LOG": "off",
            "UCX_NET_DEVICES": "lo",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def fingerprint() -> str:
    """That of the deployment's model, which PD workers tell an encode worker."""
    encoder = load_engine("transformers").load_vision_encoder(MODEL, ARGS / "encode.yaml")
    encoder.close()
    return pixels_fingerprint(encoder.fingerprint, ImageLimits())


def encode_request(fingerprint: str) -> EncodeRequest:
    """A request that the encode worker serves."""
    media = png(new_image())
    return EncodeRequest(
        fingerprint=fingerprint,
        key=embedding_key(content_digest(media), fingerprint=fingerprint).hex,
        media=media,
    )


async def exported(deployment: Deployment, fingerprint: str, monkeypatch: pytest.MonkeyPatch) -> EncodeReady:
    """An export as a member of the deployment is given it."""
    monkeypatch.setenv("DYN_FILE_KV", str(deployment.discovery))
    members = Membership((deployment.discovery / "secret").read_bytes().strip())
    request = encode_request(fingerprint)
    async with caller(ENDPOINTS["encode"]) as client:
        (instance,) = client.instance_ids()
        call = members.call("encode", instance)
        sealed = call.seal(request.model_dump(exclude={"media"}), media=request.media)
        (answer,) = await answers(client, sealed, instance)
        return parse_answer(call.open(answer))


def test_nobody_calls_the_encode_worker(
    deployment: Deployment, copied_discovery: Path, fingerprint: str
) -> None:
    request = encode_request(fingerprint).model_dump()
    told = request | {"media": base64.b64encode(request["media"]).decode()}
    before = deployment.encodes()
    for answer in stranger(copied_discovery, "encode", encode=told)["encode"]:
        assert [(one["code"], set(one)) for one in answer] == [
            ("not_a_member", {"version", "status", "code", "message"})
        ]
    assert deployment.encodes() == before


def test_nobody_drops_anything(deployment: Deployment, copied_discovery: Path, deal: Deal) -> None:
    asked = deal()
    assert deployment.ask(*asked.parts) == asked.answer
    before = deployment.entries()
    assert min(before) >= 1
    assert stranger(copied_discovery, "drop")["drop"] == ["not_a_member"] * 2
    assert deployment.entries() == before


def maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


def test_nobody_opens_what_the_workers_have(deployment: Deployment, copied_discovery: Path) -> None:
    pids = [service.popen.pid for service in deployment.services]
    arenas = {line.split(maxsplit=5)[5] for pid in pids for line in maps(pid) if " /dev/shm/" in line}
    arenas = {path for path in arenas if Path(path).exists()}
    files = [str(path) for path in deployment.folder.rglob("*")]
    assert arenas
    assert str(deployment.discovery / "secret") in files
    paths = [*arenas, *files, *(f"/proc/{pid}/{name}" for pid in pids for name in ("mem", "environ", "fd"))]
    found = stranger(copied_discovery, "look", paths=paths)["look"]
    assert set(found.values()) == {"PermissionError"}, found


async def test_nobody_reads_the_arena_even_with_what_only_members_are_told(
    deployment: Deployment, copied_discovery: Path, fingerprint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = await exported(deployment, fingerprint, monkeypatch)
    export = Export(ready.token, ready.address, ready.nbytes, ready.checksum)
    found = stranger(
        copied_discovery,
        *("read", "vm_read"),
        peer=ready.peer,
        export=vars(export),
        pid=deployment.encode.popen.pid,
        transports=["all", "tcp", "posix,cma,self"],
    )
    assert found["vm_read"] == "Operation not permitted"
    assert set(found["read"].values()) <= {"PeerLostError", "TransferError", "TimeoutError"}, found["read"]
