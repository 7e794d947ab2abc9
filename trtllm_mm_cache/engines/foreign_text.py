"""What an engine's library says of a request, where a client may read it."""

from __future__ import annotations

import re

_MOST_CHARACTERS = 200

# A path, an address in memory, a name in the library, an object's repr: nothing for clients.
_INSIDES = re.compile(r"[/\\<>]|0x[0-9a-fA-F]|\b\w+\.\w+\(|\w::\w|\b_\w|Traceback|object at")


def fit_for_client(error: Exception, otherwise: str) -> str:
    """Return the first line of `error` if it speaks of the request alone, else `otherwise`.

    Libraries refuse in words that help ("prompt length 9000 exceeds 8192"), and in words that show their
    insides. Whoever calls this keeps the whole error as the cause, so that the log has it.
    """
    line = str(error).strip().partition("\n")[0]
    fit = 0 < len(line) <= _MOST_CHARACTERS and line.isprintable() and not _INSIDES.search(line)
    return line if fit else otherwise
