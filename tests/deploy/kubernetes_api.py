"""As much of a Kubernetes API server as Dynamo's discovery asks for, on loopback.

It lists and watches, applies and deletes, chooses by labels, and refuses what a Role does not allow. What a
cluster's controllers would do (probe pods, keep EndpointSlices) is the caller's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Resource = dict[str, Any]
_STILL_S = 0.2  # how long a watch waits before it looks whether the server has ended


class KubernetesApi:
    """The objects of one namespace. Thread-safe."""

    def __init__(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Allow what `rules`, those of a Role, allow."""
        self._rules = rules
        self._changed = threading.Condition()
        self._objects: dict[tuple[str, str], Resource] = {}
        self._events: list[tuple[str, str, Resource]] = []
        self.refused: list[str] = []
        self.closing = False
        self.address = ""

    def put(self, kind: str, resource: Resource) -> Resource:
        """Create or replace an object of the plural `kind`; return it with its version."""
        with self._changed:
            name = resource["metadata"]["name"]
            event = "MODIFIED" if (kind, name) in self._objects else "ADDED"
            metadata = {
                **resource["metadata"],
                "uid": f"uid-of-{kind}-{name}",
                "generation": len(self._events),
            }
            return self._record(event, kind, {**resource, "metadata": metadata})

    def remove(self, kind: str, name: str) -> None:
        """Delete an object."""
        with self._changed:
            self._record("DELETED", kind, self._objects[kind, name])
            del self._objects[kind, name]

    def names(self, kind: str) -> set[str]:
        """Return the names of all objects of the plural `kind`."""
        with self._changed:
            return {name for each, name in self._objects if each == kind}

    def listing(self, kind: str, selector: Mapping[str, str]) -> tuple[list[Resource], int]:
        """Return the objects that have the selector's labels, and the version of this moment."""
        with self._changed:
            found = [each for (of, _), each in self._objects.items() if of == kind and _has(each, selector)]
            return found, len(self._events)

    def events(self, kind: str, selector: Mapping[str, str], since: int) -> Iterator[Resource]:
        """Yield what happens after version `since`, until the server ends."""
        position = since
        while not self.closing:
            with self._changed:
                if len(self._events) == position:
                    self._changed.wait(_STILL_S)
                new, position = self._events[position:], len(self._events)
            for event, of, resource in new:
                if of == kind and _has(resource, selector):
                    yield {"type": event, "object": resource}

    def allows(self, verb: str, group: str, kind: str) -> bool:
        """Return whether the Role allows it; what it does not is kept in `refused`."""
        for rule in self._rules:
            if group in rule["apiGroups"] and kind in rule["resources"] and verb in rule["verbs"]:
                return True
        self.refused.append(f"{verb} {kind}.{group}")
        return False

    def _record(self, event: str, kind: str, resource: Resource) -> Resource:
        resource["metadata"]["resourceVersion"] = str(len(self._events) + 1)
        self._objects[kind, resource["metadata"]["name"]] = resource
        self._events.append((event, kind, resource))
        self._changed.notify_all()
        return resource


@contextmanager
def kubernetes_api(rules: Sequence[Mapping[str, Any]]) -> Iterator[KubernetesApi]:
    """Serve the API until the block ends; its `address` is a URL."""
    api = KubernetesApi(rules)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    server.daemon_threads = True
    api.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield api
    finally:
        api.closing = True
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Paths of the form /apis/GROUP/VERSION/namespaces/NAMESPACE/KIND[/NAME]."""

    api: KubernetesApi
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        group, _, kind, name = self._target()
        query = parse_qs(urlsplit(self.path).query)
        watch = query.get("watch") == ["true"]
        if not self._allowed("get" if name else "watch" if watch else "list", group, kind):
            return
        selector = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
        if watch:
            self._stream(self.api.events(kind, selector, int(query["resourceVersion"][0])))
            return
        items, version = self.api.listing(kind, selector)
        self._answer({"kind": "List", "metadata": {"resourceVersion": str(version)}, "items": items})

    def do_PATCH(self) -> None:
        group, version, kind, name = self._target()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Content-Type"] != "application/apply-patch+yaml":
            self._answer({"kind": "Status", "status": "Failure", "code": 415}, 415)
        # Apply creates what is not there: a Role has to allow both.
        elif self._allowed("patch", group, kind) and self._allowed("create", group, kind):
            body["metadata"]["name"] = name
            self._answer(self.api.put(kind, {"apiVersion": f"{group}/{version}", **body}))

    def do_DELETE(self) -> None:
        group, _, kind, name = self._target()
        if self._allowed("delete", group, kind):
            self.api.remove(kind, name)
            self._answer({"kind": "Status", "status": "Success"})

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _target(self) -> tuple[str, str, str, str]:
        _, _, group, version, _, _, kind, *name = urlsplit(self.path).path.split("/")
        return group, version, kind, name[0] if name else ""

    def _allowed(self, verb: str, group: str, kind: str) -> bool:
        allowed = self.api.allows(verb, group, kind)
        if not allowed:
            status = {"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403}
            self._answer(status | {"message": f"the Role does not allow to {verb} {kind}"}, 403)
        return allowed

    def _answer(self, body: Resource, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterator[Resource]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the watcher has gone


def _has(resource: Resource, selector: Mapping[str, str]) -> bool:
    labels: Mapping[str, str] = resource["metadata"].get("labels", {})
    return selector.items() <= labels.items()
