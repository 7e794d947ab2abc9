"""How the processes of one deployment know each other: a shared secret that never travels.

Each call carries a nonce and an HMAC-SHA256 by the secret, and so does each answer, over the call's nonce: a
process that only poses as a worker learns nothing by being called, and what it answers is not believed. A
proof is bound to one purpose and to the instance that is called, so it cannot be taken to another worker.

    call      {"body": JSON, "nonce", "proof", "apart": {large bytes}}
    answer    {"body": JSON, "proof"}
    proof     HMAC(secret; "call" or "answer", purpose, instance, the call's nonce, body)

The body is proved as the text that arrives: no two programs need to agree on how to write JSON. What is
`apart` (an image's bytes) is not hashed: it passes a network that is trusted anyway (SECURITY.md). A call
that is recorded can be repeated to the same process as long as that lives.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trtllm_mm_cache.errors import NotAMemberError
from trtllm_mm_cache.runtime.messages import EncodeFault
from trtllm_mm_cache.runtime.streaming import RequestContext

logger = logging.getLogger(__name__)

GENERATE: Final = "generate"
"""The purpose of a frontend's call of a PD worker."""

PROOF_FIELD: Final = "membership"
"""Where a call to `generate`, and the first item of its answer, carry their proof."""

_WAY_OUT = "give all processes of a deployment the same secret (MM_CACHE_SECRET_FILE)"

Handler = Callable[[Any, RequestContext], AsyncIterator[dict[str, Any]]]


@dataclass(frozen=True)
class Call:
    """The caller's end of one call to `instance`, for `purpose`: it proves itself, and checks the answer."""

    members: Membership
    purpose: str
    instance: int
    nonce: str

    def seal(self, message: Mapping[str, Any], **apart: bytes) -> dict[str, Any]:
        """Return what to send for `message`; `apart` travels beside it and is no part of the proof."""
        body = json.dumps(message, separators=(",", ":"))
        return {**self.proof(body), "body": body, "apart": apart}

    def proof(self, body: str = "") -> dict[str, str]:
        """Return nonce and proof over `body`, for a call that carries them in a form of its own."""
        mac = self.members.mac("call", self.purpose, self.instance, self.nonce, body)
        return {"nonce": self.nonce, "proof": mac}

    def open(self, answer: Any) -> Any:
        """Return the message in an answer; raises `NotAMemberError` unless the instance has proved itself."""
        body = answer.get("body") if isinstance(answer, dict) else None
        if not isinstance(body, str):
            raise self._not_a_member(answer)
        self.check(answer, body)
        return json.loads(body)

    def check(self, answer: Any, body: str = "") -> None:
        """Raise `NotAMemberError` unless `answer` has the proof over `body` that belongs to this call."""
        given = answer.get("proof") if isinstance(answer, dict) else None
        wanted = self.members.mac("answer", self.purpose, self.instance, self.nonce, body)
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), wanted.encode()):
            raise self._not_a_member(answer)

    def _not_a_member(self, answer: Any) -> NotAMemberError:
        refused = isinstance(answer, dict) and answer.get("code") == NotAMemberError.code
        reason = "says that this process does not" if refused else "did not prove that it does"
        return NotAMemberError(
            f"worker {self.instance:x} was asked whether it belongs to this deployment and {reason}; "
            f"{_WAY_OUT}"
        )


class Membership:
    """The deployment's secret, as one process has it. Thread-safe.

    `refused` counts calls without a valid proof.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.refused = 0

    def __repr__(self) -> str:
        return "Membership(<secret>)"

    def call(self, purpose: str, instance: int) -> Call:
        """Begin a call to `instance`."""
        return Call(self, purpose, instance, secrets.token_hex(16))

    def guarded(self, purpose: str, instance: int, handler: Handler) -> Handler:
        """Return `handler` behind a guard: it gets the messages of members alone, and proves its answers.

        `instance` is this process's own id in discovery. The handler gets what was sealed and what came apart
        as one dictionary. Who has no proof gets the code `not_a_member` and nothing else; the handler is not
        called.
        """

        async def guard(payload: Any, context: RequestContext) -> AsyncIterator[dict[str, Any]]:
            """Check the call's proof, then yield the handler's answers, each with a proof of ours."""
            body = payload.get("body") if isinstance(payload, dict) else None
            try:
                nonce = self.check(purpose, instance, payload, body if isinstance(body, str) else "")
            except NotAMemberError as error:
                # Without a proof of ours, which would be made over what a stranger has chosen.
                yield EncodeFault.of(error).model_dump()
                return
            answers = handler(_opened(payload), context)
            del payload, body  # megabytes, and the handler knows until when it needs them
            async for answer in answers:
                text = json.dumps(answer, separators=(",", ":"))
                yield {"body": text, "proof": self.mac("answer", purpose, instance, nonce, text)}

        return guard

    def admit(self, instance: int, payload: Any, *, required: bool) -> dict[str, Any]:
        """Take the proof off a call of `generate` and return what the answer's first item is to carry.

        Raises `NotAMemberError` for a call without a valid proof; one that is not `required` may be absent.
        """
        carried = payload.pop(PROOF_FIELD, None) if isinstance(payload, dict) else None
        if carried is None and not required:
            return {}
        nonce = self.check(GENERATE, instance, carried)
        return {PROOF_FIELD: {"proof": self.mac("answer", GENERATE, instance, nonce, "")}}

    def check(self, purpose: str, instance: int, call: Any, body: str = "") -> str:
        """Return the nonce of a call that was proved by `Call.proof`, else raise `NotAMemberError`."""
        nonce, given = (call.get(name) for name in ("nonce", "proof")) if isinstance(call, dict) else ("", "")
        if isinstance(nonce, str) and isinstance(given, str):
            wanted = self.mac("call", purpose, instance, nonce, body)
            if hmac.compare_digest(given.encode(), wanted.encode()):
                return nonce
        self.refused += 1
        if self.refused.bit_count() == 1:  # who calls without the secret does not fill the log
            logger.warning(
                "refused a call of %s without the deployment's secret (%d so far); %s",
                purpose,
                self.refused,
                _WAY_OUT,
            )
        raise NotAMemberError(f"the caller did not prove that it belongs to this deployment; {_WAY_OUT}")

    def mac(self, *parts: str | int) -> str:
        """Return the HMAC over `parts`, each with its length, in hex."""
        framed = bytearray(b"trtllm-mm-cache membership 1")
        for part in parts:
            data = str(part).encode(errors="surrogatepass")
            framed += len(data).to_bytes(8, "big") + data
        return hmac.digest(self._secret, framed, "sha256").hex()


def _opened(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a call that was proved, with what came apart."""
    message, apart = json.loads(payload["body"]), payload.get("apart")
    return {**apart, **message} if isinstance(message, dict) and isinstance(apart, dict) else message
