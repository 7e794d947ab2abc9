"""What is printed when the stack serves: commands to copy."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from trtllm_mm_cache.serve.folder import DISCOVERY_VARIABLE, SECRET_VARIABLE, RunFolder
from trtllm_mm_cache.serve.model import shipped
from trtllm_mm_cache.serve.plan import Plan
from trtllm_mm_cache.settings import DEFAULT_ENCODE_ENDPOINT

_CARD = "card.png"
_CARD_QUESTION = "Where is the yellow cross?"
# What another terminal needs to find the processes, as far as it is set.
_FOR_ANOTHER_TERMINAL = (
    "DYN_DISCOVERY_BACKEND",
    DISCOVERY_VARIABLE,
    "DYN_REQUEST_PLANE",
    "DYN_EVENT_PLANE",
    "ETCD_ENDPOINTS",
    "NATS_SERVER",
    SECRET_VARIABLE,
)


def hints(plan: Plan, folder: RunFolder, environment: Mapping[str, str], seconds: float) -> str:
    """Return the lines. Writes the request body that they name into `folder`."""
    card = shipped("models") / _CARD
    image, question = (str(card), _CARD_QUESTION) if plan.is_demo else ("photo.jpg", "What is this?")
    body = folder.write("ask.json", json.dumps(_request(plan.name, question, card)))
    command = _command()
    variables = {name: environment[name] for name in _FOR_ANOTHER_TERMINAL if name in environment}
    variables["DYN_HTTP_PORT"] = str(plan.settings.http_port)
    if plan.settings.encode_endpoint != DEFAULT_ENCODE_ENDPOINT:
        variables["ENCODE_ENDPOINT"] = plan.settings.encode_endpoint
    export = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    return f"""\
[launch] serving {plan.name} with {plan.engine} on {plan.url} after {seconds:.0f} s. Try:

  {command} ask --url {plan.url} {shlex.quote(image)} "{question}"

  curl -s {plan.url}/v1/chat/completions -H 'Content-Type: application/json' -d @{shlex.quote(str(body))}

[launch] To drop what the workers hold, copy this into another terminal:

  export {export}

  {command} drop --all

[launch] Ctrl-C stops everything."""


def _request(model: str, question: str, image: Path) -> dict[str, object]:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": model, "max_tokens": 32, "messages": [{"role": "user", "content": content}]}


def _command() -> str:
    """Return how this program is called where its virtual environment is not active."""
    script = Path(sys.executable).with_name("trtllm-mm-cache")
    if not os.access(script, os.X_OK):
        return f"{shlex.quote(sys.executable)} -m trtllm_mm_cache.cli"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
