"""Connections to a store: one server, or the nodes of a cluster.

The client library connects, authenticates and speaks TLS, by its URL, and reads and writes the protocol. What
it does beyond that is left out: it would try again by itself, for ten seconds where a server is frozen, and
read a large value through several copies. Commands are sent as they are, on connections that belong to one
thread at a time, and one that has failed is closed: no late byte can arrive on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool
from redis.crc import key_slot
from redis.exceptions import MovedError, OutOfMemoryError, RedisError
from redis.retry import Retry

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.tiers.storage import StorageError, StorageFullError

T = TypeVar("T")

_IDLE = 8
_SAID_CHARACTERS = 80  # of the reason; it may go on with advice

Node = tuple[str, int]


class StoreNodes:
    """The servers that `url` leads to; nobody is contacted before the first call. Thread-safe.

    `timeout_s` bounds each single send and receive, and the time to connect. Which node of a cluster has a
    key is learned from the nodes' own answers. Raises `ConfigurationError` for a URL that the client does not
    take.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        try:
            pool = ConnectionPool.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                retry_on_timeout=False,
                health_check_interval=0,
                decode_responses=False,
                protocol=2,
            )
        except (ValueError, TypeError):
            raise ConfigurationError(
                "the store's URL (MM_CACHE_STORE_URL, --multimodal-embedding-cache-store-url) must be "
                "redis://host:port/number, rediss:// for TLS, with user:password@ before the host"
            ) from None
        self._kind, self._options = pool.connection_class, dict(pool.connection_kwargs)
        self._first: Node = (str(self._options.get("host", "")), int(self._options.get("port", 0)))
        self._lock = threading.Lock()
        self._idle: dict[Node, list[Connection]] = {}
        self._slots: dict[int, Node] = {}
        self._closed = False

    def call(self, key: bytes, work: Callable[[Connection], T]) -> T:
        """Return what `work` makes of a connection to the node of `key`. Raises `StorageError`.

        It is called once more where the key has moved to another node, or where the connection had been idle
        and turns out to have been closed meanwhile, which a server does when it restarts.
        """
        with failures_named():
            try:
                return self._on(self._node_of(key), work)
            except MovedError as moved:
                node = (moved.host or self._first[0], moved.port)
                with self._lock:
                    self._slots[moved.slot_id] = node
                return self._on(node, work)

    def each_node(self) -> Iterator[Node]:
        """Yield the server, or every node of a cluster that has keys. Raises `StorageError`."""
        with failures_named():
            try:
                ranges = self._on(self._first, lambda to: command(to, "CLUSTER", "SLOTS"))
            except redis.ResponseError:  # no cluster
                ranges = [(0, 0, (b"", self._first[1]))]
        nodes = {(bytes(found[2][0]).decode() or self._first[0], int(found[2][1])) for found in ranges}
        yield from sorted(nodes)

    def at(self, node: Node, work: Callable[[Connection], T]) -> T:
        """Return what `work` makes of a connection to `node`. Raises `StorageError`."""
        with failures_named():
            return self._on(node, work)

    def take(self, node_key: bytes) -> tuple[Node, Connection, bool]:
        """Return a connection to the node of a key and whether it was idle; end it by `give` or close it."""
        return self._take(self._node_of(node_key))

    def give(self, node: Node, connection: Connection) -> None:
        """Keep a connection on which nothing is under way."""
        with self._lock:
            idle = self._idle.setdefault(node, [])
            if len(idle) < _IDLE and not self._closed:
                idle.append(connection)
                return
        connection.disconnect()

    def close(self) -> None:
        """Close what is idle; the rest is closed when it is given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = [each for group in self._idle.values() for each in group], {}
        for connection in idle:
            connection.disconnect()

    def _node_of(self, key: bytes) -> Node:
        return self._slots.get(key_slot(key), self._first)

    def _on(self, node: Node, work: Callable[[Connection], T]) -> T:
        node, connection, was_idle = self._take(node)
        try:
            result = work(connection)
        except redis.ConnectionError:
            connection.disconnect()
            if not was_idle:
                raise
            self._forget_idle(node)
            node, connection, _ = self._take(node)
            try:
                result = work(connection)
            except BaseException:
                connection.disconnect()
                raise
        except BaseException:
            connection.disconnect()
            raise
        self.give(node, connection)
        return result

    def _take(self, node: Node) -> tuple[Node, Connection, bool]:
        with self._lock:
            idle = self._idle.get(node)
            if idle:
                return node, idle.pop(), True
        options = (
            self._options if node == self._first else {**self._options, "host": node[0], "port": node[1]}
        )
        connection: Connection = self._kind(**options)
        connection.connect()
        return node, connection, False

    def _forget_idle(self, node: Node) -> None:
        with self._lock:
            idle = self._idle.pop(node, [])
        for connection in idle:
            connection.disconnect()


def command(connection: Connection, *words: Any) -> Any:
    """Send one command and return its answer. Raises `RedisError`."""
    connection.send_command(*words)
    return connection.read_response()


@contextmanager
def failures_named() -> Iterator[None]:
    """Name what the client raises, without what it says itself, which may hold the address."""
    try:
        yield
    except OutOfMemoryError as error:
        raise StorageFullError("the store has no memory left and evicts nothing") from error
    except redis.AuthenticationError as error:
        raise StorageError("the store refuses the user or password of its URL") from error
    except redis.TimeoutError as error:
        raise StorageError("the store has not answered in time") from error
    except (redis.ConnectionError, OSError) as error:
        raise StorageError("the store cannot be reached, or has closed the connection") from error
    except RedisError as error:
        said = str(error)[:_SAID_CHARACTERS]
        raise StorageError(f"the store refuses a command ({type(error).__name__}: {said})") from error
