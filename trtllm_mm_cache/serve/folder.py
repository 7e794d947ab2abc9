"""The folder of a run: logs, discovery, the secret that the processes share. Closed to other users."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from trtllm_mm_cache.errors import ConfigurationError

SECRET_VARIABLE = "MM_CACHE_SECRET_FILE"  # noqa: S105 - where it is, not what
DISCOVERY_VARIABLE = "DYN_FILE_KV"
_SECRET_BYTES = 32
_UMASK = 0o077


class RunFolder:
    """A folder of mode 0700. Once it is made, all that this process and its children make is theirs alone."""

    def __init__(self, path: Path | None) -> None:
        """Make it. Raises `ConfigurationError` when that cannot be, or when it belongs to another user."""
        os.umask(_UMASK)
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.path = (path or Path(".run") / name).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            status = self.path.stat()
            if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & _UMASK:
                self.path.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(
                f"the run folder {self.path} cannot be made: {error.strerror}; set RUN_DIR to another one"
            ) from error
        if status.st_uid != os.geteuid():
            raise ConfigurationError(
                f"the run folder {self.path} is another user's; set RUN_DIR to one of yours"
            )
        self._discovery: int | None = None

    def log(self, name: str) -> Path:
        """Return where the process of that name logs."""
        return self.path / f"{name.replace(' ', '-')}.log"

    def claim_discovery(self, given: str | None) -> Path:
        """Return the folder by which processes find each other, `given` or our own; held until we end.

        Raises `ConfigurationError` when another stack holds it: its workers would be taken for ours.
        """
        path = Path(given) if given else self.path / "discovery"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._discovery = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._discovery, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"{DISCOVERY_VARIABLE}={path} belongs to a stack that runs: this terminal has its `export` "
                f"line. Start another stack from another terminal, or after: unset {DISCOVERY_VARIABLE} "
                f"{SECRET_VARIABLE} DYN_HTTP_PORT"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"the discovery folder {DISCOVERY_VARIABLE}={path} cannot be used: {error.strerror}"
            ) from error
        return path

    def make_secret(self) -> Path:
        """Write a new secret of this run and return where it is."""
        return self.write("secret", f"{secrets.token_hex(_SECRET_BYTES)}\n")

    def record(self, rows: Sequence[Sequence[str]]) -> None:
        """Replace `processes.tsv`: name, pid, port of metrics, log of each process, one a line."""
        text = "".join("\t".join(row) + "\n" for row in rows)
        self.write(".processes.tsv", text).rename(self.path / "processes.tsv")

    def write(self, name: str, text: str) -> Path:
        """Write a new file of that name, readable by its owner alone, in the place of an old one."""
        path = self.path / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        return path
