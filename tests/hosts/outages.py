"""How soon is an encode worker on another host used again after the cable between them was cut?

    python -m tests.hosts.outages --seconds 1 5 9 20

Prints one row for each length of the cut; a picture is being asked for while it lasts. A cut that outlasts
the etcd lease (`--lease-ttl`) costs the encode worker its place in discovery. Dynamo then ends the process,
and it is restarted here when the cable is whole.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import openai

from tests.e2e.stack import wait_until
from tests.hosts.deployment import Deployment, deployed
from tests.hosts.network import reason_to_skip
from tools.demo_model.pictures import draw, random_scene

QUESTION = "Describe the picture."
_rng = random.Random(1)


def answered(deployment: Deployment) -> bool:
    """Ask about a new image; return whether there was an answer."""
    try:
        return bool(deployment.ask(draw(random_scene(_rng)), QUESTION))
    except openai.InternalServerError:
        return False


def used_again_after(deployment: Deployment, seconds: float) -> tuple[float, bool]:
    """Cut the cable for so long; return the seconds until the far worker serves, and whether it ended."""
    assert answered(deployment)
    deployment.cable.cut()
    mend_at = time.monotonic() + seconds
    waiting = deployment.begin(draw(random_scene(_rng)), QUESTION)
    time.sleep(mend_at - time.monotonic())
    ended = not deployment.far_encoder.alive
    deployment.cable.mend()
    repaired_at = time.monotonic()
    while True:
        if not deployment.far_encoder.alive:
            ended = True
            deployment.far_encoder.start()
            deployment.far_encoder.wait_ready()
            repaired_at = time.monotonic()
        if answered(deployment):
            break
        assert time.monotonic() < repaired_at + 120, "not used again within two minutes"
        time.sleep(0.1)
    took = time.monotonic() - repaired_at
    wait_until(waiting.done, 60, "the request of the outage never ended")
    return took, ended


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the cable between two hosts and time the recovery.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 5, 9, 20])
    parser.add_argument("--lease-ttl", type=int, default=10, help="ETCD_LEASE_TTL in seconds; Dynamo's is 10")
    parser.add_argument(
        "--rto-max-ms", type=int, help="net.ipv4.tcp_rto_max_ms (Linux: 120000); sets tcp_retries2 too"
    )
    arguments = parser.parse_args()
    reason = reason_to_skip("etcd")
    if reason is not None:
        raise SystemExit(reason)
    with deployed(Path(tempfile.mkdtemp(prefix="hosts-")), lease_ttl_s=arguments.lease_ttl) as deployment:
        print("| cut for | encode worker | used again after |\n|---|---|---|")
        for seconds in arguments.seconds:
            took, ended = used_again_after(deployment, seconds)
            fate = "ended; used again after its restart" if ended else "stayed"
            print(f"| {seconds:g} s | {fate} | {took:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
