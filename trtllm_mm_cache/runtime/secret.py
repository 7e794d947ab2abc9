"""Where the deployment's secret and the discovery folder lie, and that no other user can get at them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from trtllm_mm_cache.errors import ConfigurationError
from trtllm_mm_cache.runtime.membership import Membership
from trtllm_mm_cache.settings import DiscoverySettings

_MIN_BYTES, _MAX_BYTES = 32, 4096
_DEPLOYMENT = "the deployment's secret"
_MAKE_ONE = "make one with `(umask 077; openssl rand -hex 32 > FILE)`"


def load_membership(settings: DiscoverySettings) -> Membership:
    """Return this process's membership: the secret of `settings.secret_file`.

    With `file` discovery and no such file named, it is the file `secret` in the discovery folder, which the
    first process makes. Raises `ConfigurationError` when there is none, or others could read it.
    """
    if settings.secret_file is not None:
        return Membership(read_secret(settings.secret_file))
    match settings.discovery_backend:
        case "file":
            file = discovery_folder() / "secret"
            make_secret(file)
            return Membership(read_secret(file))
        case "mem":
            return Membership(secrets.token_bytes(32))  # a deployment of this process alone
        case backend:
            raise ConfigurationError(
                f"with {backend} discovery the processes of a deployment need a shared secret, and "
                f"MM_CACHE_SECRET_FILE (--secret-file) is not set; {_MAKE_ONE} and give it to all of them"
            )


def discovery_folder() -> Path:
    """Return the folder of `file` discovery, made with mode 0700 if need be.

    DYN_FILE_KV names it; where that is not set, it is a folder in XDG_RUNTIME_DIR, which is each user's own,
    and DYN_FILE_KV is set to it, for Dynamo and for child processes. Raises `ConfigurationError` for a folder
    that other users own, can write to or can exchange.
    """
    named = os.environ.get("DYN_FILE_KV")
    if not named:
        own = os.environ.get("XDG_RUNTIME_DIR")
        if not own:
            raise ConfigurationError(
                "file discovery needs a folder of this user's own: set DYN_FILE_KV, the same for all "
                "processes of a deployment (`export DYN_FILE_KV=$HOME/.mm-cache`); Dynamo's own choice, "
                "below the folder for temporary files, is open to every user of this machine"
            )
        named = os.environ["DYN_FILE_KV"] = str(Path(own, "trtllm-mm-cache"))
    folder = Path(named)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(folder, folder.stat())
        for above in folder.resolve().parents:
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise ConfigurationError(
                    f"discovery folder {folder}: every user of this machine can exchange it, because {above} "
                    "is writable for all; set DYN_FILE_KV to a folder of this user's own"
                )
    except OSError as error:
        raise ConfigurationError(
            f"discovery folder {folder} (DYN_FILE_KV) cannot be used: {error.strerror}"
        ) from error
    return folder


def _check_folder(folder: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"DYN_FILE_KV={folder} is not a folder")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"discovery folder {folder} (DYN_FILE_KV) belongs to user {found.st_uid}, and this process runs "
            f"as user {os.geteuid()}; run all processes of a deployment, drop and top too, as one user"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"discovery folder {folder} (DYN_FILE_KV) is writable for other users, who could put workers of "
            f"their own there; run `chmod 700 {folder}`, or use another folder"
        )


def make_secret(file: Path, what: str = _DEPLOYMENT) -> None:
    """Make the secret `what` unless it is there. It appears whole: no other process reads half of it.

    Raises `ConfigurationError`.
    """
    if file.exists():
        return
    new = file.with_name(f".secret-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as opened:
                opened.write(secrets.token_hex(32) + "\n")
            os.link(new, file)
        except FileExistsError:
            return  # another process was first
        finally:
            new.unlink()
    except OSError as error:
        raise ConfigurationError(f"{what} {file} cannot be made: {error.strerror}") from error


def read_secret(file: Path, what: str = _DEPLOYMENT) -> bytes:
    """Return the secret `what` in `file`, judged by what was opened: Kubernetes mounts are links.

    Raises `ConfigurationError` when there is none, or others could read it.
    """
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            _check_file(file, found, what)
            secret = opened.read(_MAX_BYTES + 1).strip()
    except OSError as error:
        raise ConfigurationError(
            f"{what} {file} cannot be read: {error.strerror}; {_MAKE_ONE}, readable for the "
            "user that runs this process"
        ) from error
    if not _MIN_BYTES <= len(secret) <= _MAX_BYTES:
        raise ConfigurationError(f"{what} {file} must have {_MIN_BYTES} to {_MAX_BYTES} bytes; {_MAKE_ONE}")
    return secret


def _check_file(file: Path, found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigurationError(f"{what} {file} is not a file")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigurationError(
            f"{what} {file} belongs to user {found.st_uid}: it must be this user's or root's"
        )
    if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigurationError(
            f"{what} {file} is open to other users (mode {stat.S_IMODE(found.st_mode):o}); "
            f"run `chmod 600 {file}`, or set defaultMode: 0400 where Kubernetes mounts it"
        )
