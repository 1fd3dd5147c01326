"""The present target of a dial, as a number in a file, for those processes of a server that answer requests."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import atexit
import multiprocessing
import os
import struct
import tempfile
from pathlib import Path

FILE = "LONGCAT_DIAL_TARGET"
"""Environment variable: the file, by which a server's processes have it in common."""
_NUMBER = struct.Struct("d")


_made: str | None = None


def settle(has_dial: bool) -> None:
    """Have a file where there is to be a dial. Called by a server's first process before it starts others, which find
    it: what they call changes nothing. On other machines they have none."""
    global _made
    if multiprocessing.parent_process() is not None:
        return
    os.environ.pop(FILE, None)  # of a server in this process before, or of one that has started it
    if not has_dial:
        return
    if _made is None:
        descriptor, _made = tempfile.mkstemp(prefix="longcat-dial-")
        os.close(descriptor)
        atexit.register(Path(_made).unlink, missing_ok=True)
    os.environ[FILE] = _made


def write(target: float) -> None:
    """For ranks of a model, all of which write the same."""
    if (descriptor := _opened(os.O_WRONLY)) is not None:
        os.pwrite(descriptor, _NUMBER.pack(target), 0)  # so few bytes are read as a whole or not yet
        os.close(descriptor)


def read() -> float | None:
    """None where there is no dial, or its ranks have not written yet, or not here."""
    if (descriptor := _opened(os.O_RDONLY)) is None:
        return None
    found = os.pread(descriptor, _NUMBER.size, 0)
    os.close(descriptor)
    return float(_NUMBER.unpack(found)[0]) if found else None


def _opened(flags: int) -> int | None:
    try:
        return os.open(os.environ[FILE], flags)
    except (KeyError, FileNotFoundError):
        return None
