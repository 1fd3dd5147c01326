"""The present target of a dial, as a number in a file, for those processes of a server that answer requests."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)
FILE = "LONGCAT_DIAL_TARGET"
"""Environment variable: the file, by which a server's processes have it in common."""
_NUMBER = struct.Struct("d")
_NO_OTHER_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Nothing that somebody puts in the place of a file that was removed is followed, or waited for."""

_made: str | None = None


def settle(has_dial: bool) -> None:
    """Have a file where there is to be a dial. Called by a server's first process before it starts others, which find
    it: what they call changes nothing. On other machines they have none. Without a place for it responses name no
    target, and a warning says so."""
    global _made
    if multiprocessing.parent_process() is not None:
        return
    os.environ.pop(FILE, None)  # of a server in this process before, or of one that has started it
    if not has_dial:
        return
    if _made is None:
        try:
            descriptor, _made = tempfile.mkstemp(prefix="longcat-dial-")
        except OSError as error:
            logger.warning("LongCat: responses do not name the dial's target, for want of a file: %s", error)
            return
        os.close(descriptor)
        atexit.register(Path(_made).unlink, missing_ok=True)
    os.environ[FILE] = _made


def write(target: float) -> None:
    """For ranks of a model, all of which write the same. Raises nothing, as a rank that does leaves the others waiting:
    then responses name the target before."""
    with suppress(KeyError, OSError):
        descriptor = os.open(os.environ[FILE], os.O_WRONLY | _NO_OTHER_FILE)
        try:
            os.pwrite(descriptor, _NUMBER.pack(target), 0)
        finally:
            os.close(descriptor)


def read() -> float | None:
    """None where there is no dial, or its ranks have not written yet, or not here."""
    try:
        descriptor = os.open(os.environ[FILE], os.O_RDONLY | _NO_OTHER_FILE)
        try:
            found = os.pread(descriptor, _NUMBER.size, 0)
        finally:
            os.close(descriptor)
    except (KeyError, OSError):
        return None
    return float(_NUMBER.unpack(found)[0]) if len(found) == _NUMBER.size else None
