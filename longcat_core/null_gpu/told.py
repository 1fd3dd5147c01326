"""What an engine's log says of its choices."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def told(loggers: Sequence[str], words: Sequence[str], but: Sequence[str] = ()) -> Iterator[list[str]]:
    """Lines that have one of the words in them, and all warnings, once each; none that begins as one of `but`.

    loggers: names, and not the root's, whose handlers an engine removes when it configures its log.
    """
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            is_told = record.levelno >= logging.WARNING or any(word in message for word in words)
            if is_told and message not in lines and not message.startswith(tuple(but)):
                lines.append(message)

    handler = Lines()
    for logger in loggers:
        logging.getLogger(logger).addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logging.getLogger(logger).removeHandler(handler)


def text_of(error: Exception) -> str:
    """With where it was raised."""
    where = "".join(traceback.format_tb(error.__traceback__)[-4:])
    return f"{type(error).__name__}: {error}\n{where}".strip()
