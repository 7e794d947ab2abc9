"""The store tier's storage: one value an embedding, over the Redis protocol.

    mm-cache:1:FINGERPRINT:TAG:KEY      header and payload, as in every tier; TAG is "-" without a salt

A value is read in pieces of a megabyte, the next asked for while one is checked: that is faster than one
answer of all, and needs no own parser. It is written in one transaction, so that it is there whole or not.
The server evicts by its own policy and expires what is too old.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redis.connection import Connection
from redis.exceptions import ExecAbortError, OutOfMemoryError, ResponseError

from trtllm_mm_cache.cache.scope import Dropped, Selection
from trtllm_mm_cache.tiers.format import HEADER_BYTES, VERSION, EntryName
from trtllm_mm_cache.tiers.storage import Contents, Judge, OpenEntry, StorageError
from trtllm_mm_cache.tiers.store_nodes import Node, StoreNodes, command, failures_named

_PREFIX = f"mm-cache:{VERSION}:"
_READ_BYTES = 1024 * 1024
_WRITE_BYTES = 2 * 1024 * 1024
_SCAN_KEYS = 256


class StoreStorage:
    """`Storage` at `url`, for the model with `fingerprint`. Thread-safe.

    `timeout_s` as in `StoreNodes`. Raises `ConfigurationError` for a URL that is none; the store may be dead.
    """

    name = "store"
    writes = True

    def __init__(
        self, url: str, fingerprint: str, *, timeout_s: float = 0.1, max_age_s: float | None = None
    ) -> None:
        self._nodes = StoreNodes(url, timeout_s=timeout_s)
        self._fingerprint = fingerprint[:16]
        self._max_age_s = max_age_s

    def may_have(self, key: str) -> bool:
        """See `Storage.may_have`: only the server knows."""
        return True

    def look_up(self, name: EntryName) -> OpenEntry | None:
        """See `Storage.look_up`."""
        key = self._key(name)

        def work(connection: Connection) -> tuple[bytes, int]:
            connection.send_command("GETRANGE", key, 0, HEADER_BYTES - 1)
            connection.send_command("STRLEN", key)
            header, size = answers(connection, 2)
            return header, size

        header, size = self._nodes.call(key, work)
        return _Value(self._nodes, key, header, size) if size else None

    def store(self, name: EntryName, header: bytes, payload: memoryview) -> None:
        """See `Storage.store`."""
        key = self._key(name)
        expiry = () if self._max_age_s is None else ("EX", max(1, int(self._max_age_s)))
        pieces = [payload[start : start + _WRITE_BYTES] for start in range(0, len(payload), _WRITE_BYTES)]

        def work(connection: Connection) -> None:
            connection.send_command("MULTI")
            connection.send_command("SET", key, header, *expiry)
            for piece in pieces:
                connection.send_command("APPEND", key, piece)
            connection.send_command("EXEC")
            *_, lengths = answers(connection, len(pieces) + 3)
            if lengths[-1] != len(header) + len(payload):
                raise StorageError("the store says that it has stored something else")

        self._nodes.call(key, work)

    def touch(self, name: EntryName) -> bool:
        """See `Storage.touch`."""
        key = self._key(name)
        return bool(self._nodes.call(key, lambda connection: command(connection, "TOUCH", key)))

    def remove(self, name: EntryName) -> None:
        """See `Storage.remove`."""
        key = self._key(name)
        self._nodes.call(key, lambda connection: command(connection, "UNLINK", key))

    def drop(self, selection: Selection, judge: Judge) -> Dropped:
        """See `Storage.drop`. The server looks through all its keys; by content, every header is read.

        Other models' entries are dropped with the rest by salt and content. What others have stored stays.
        """
        mine = "*" if selection.tag or selection.content else self._fingerprint
        tag = "*" if selection.tag is None else selection.tag.hex()
        pattern = f"{_PREFIX}{mine}:{tag}:{selection.key or '*'}"
        dropped: list[str] = []
        nbytes = 0
        for node in self._nodes.each_node():
            for key in self._found(node, pattern):
                if selection.content is None or self._is_of(node, key, selection, judge):
                    size, removed = self._nodes.at(node, _Removal(key))
                    if removed:
                        dropped.append(_embedding(key))
                        nbytes += max(0, size - HEADER_BYTES)
        return Dropped(tuple(dropped), nbytes)

    def tidy(self, judge: Judge) -> None:
        """See `Storage.tidy`: the server does it."""

    def contents(self) -> Contents:
        """See `Storage.contents`: the server's own metrics say."""
        return Contents()

    def close(self) -> None:
        """See `Storage.close`."""
        self._nodes.close()

    def _key(self, name: EntryName) -> bytes:
        tag = "-" if name.tag is None else name.tag.hex()
        return f"{_PREFIX}{self._fingerprint}:{tag}:{name.key}".encode()

    def _found(self, node: Node, pattern: str) -> Iterator[bytes]:
        cursor: Any = 0
        while True:
            words = ("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_KEYS)
            cursor, keys = self._nodes.at(node, lambda to, words=words: command(to, *words))  # type: ignore[misc]
            yield from keys
            if int(cursor) == 0:
                return

    def _is_of(self, node: Node, key: bytes, selection: Selection, judge: Judge) -> bool:
        words = ("GETRANGE", key, 0, HEADER_BYTES - 1)
        header = judge(self._nodes.at(node, lambda to: command(to, *words)), _embedding(key))
        return header is not None and header.selected_by(selection)


class _Removal:
    """Removes a key and says how large it was."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, connection: Connection) -> tuple[int, int]:
        connection.send_command("STRLEN", self._key)
        connection.send_command("UNLINK", self._key)
        size, removed = answers(connection, 2)
        return size, removed


class _Value:
    """`OpenEntry`: a value that was found. It takes a connection for the payload."""

    def __init__(self, nodes: StoreNodes, key: bytes, header: bytes, size: int) -> None:
        self.header = header
        self.size = size
        self._nodes = nodes
        self._key = key
        self._at: tuple[Node, Connection] | None = None
        self._asked = HEADER_BYTES
        self._answers = 0  # that were asked for and not read
        self._rest = memoryview(b"")

    def read(self, piece: memoryview, offset: int) -> int:
        """See `OpenEntry.read`."""
        done = 0
        with failures_named():
            while done < len(piece):
                if not self._rest:
                    self._rest = memoryview(self._next())
                    if not self._rest:
                        break
                taken = self._rest[: len(piece) - done]
                piece[done : done + len(taken)] = taken
                self._rest = self._rest[len(taken) :]
                done += len(taken)
        return done

    def close(self) -> None:
        """See `OpenEntry.close`: a connection with answers under way is of no more use."""
        at, self._at = self._at, None
        if at is None:
            return
        if self._answers:
            at[1].disconnect()
        else:
            self._nodes.give(*at)

    def _next(self) -> bytes:
        """Return the next piece of the value; ask for the one after it first."""
        if self._at is None:
            node, connection, _ = self._nodes.take(self._key)
            self._at = node, connection
            self._ask(connection)
        _, connection = self._at
        if self._asked < self.size:
            self._ask(connection)
        if not self._answers:
            return b""
        try:
            answer: bytes = connection.read_response()
        except BaseException:
            connection.disconnect()
            self._at = None
            raise
        self._answers -= 1
        return answer

    def _ask(self, connection: Connection) -> None:
        connection.send_command("GETRANGE", self._key, self._asked, self._asked + _READ_BYTES - 1)
        self._asked += _READ_BYTES
        self._answers += 1


def answers(connection: Connection, count: int) -> list[Any]:
    """Return the answers to `count` commands that were sent. Raises the first error that tells the reason."""
    found: list[Any] = []
    failure: ResponseError | None = None
    for _ in range(count):
        try:
            found.append(connection.read_response())
        except ResponseError as error:
            if failure is None or isinstance(failure, ExecAbortError) or isinstance(error, OutOfMemoryError):
                failure = error
    if failure is not None:
        raise failure
    return found


def _embedding(key: bytes) -> str:
    return key.rpartition(b":")[2].decode("ascii", errors="replace")
