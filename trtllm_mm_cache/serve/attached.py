"""Processes that end with the one that started them, however that ends: the kernel sends them a signal.

Run as a script, it becomes another program: `python attached.py PARENT SIGNAL COMMAND [ARGUMENT]...`. The
signal survives the exec. This file imports nothing but the standard library, to be quick at that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1
_SET_NAME = 15
_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int, number: int) -> None:
    """Have the kernel send `number` to this process when `parent`, its parent, ends.

    Ends this process at once where `parent` has ended before the kernel was told.
    """
    _prctl(_SET_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, instead of the system's first process."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show; the kernel keeps 15 bytes of it."""
    _prctl(_SET_NAME, ctypes.c_char_p(name.encode()))


def _prctl(option: int, value: int | ctypes.c_char_p) -> None:
    if isinstance(value, int):
        value = ctypes.c_ulong(value)  # type: ignore[assignment]
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """Become the command of the command line, attached to its parent."""
    parent, number, *command = sys.argv[1:]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an exec hands that on
    end_with(int(parent), int(number))
    os.execvp(command[0], command)  # noqa: S606 - that is what this is for


if __name__ == "__main__":
    main()
