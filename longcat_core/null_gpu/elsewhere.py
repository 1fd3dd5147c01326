"""What is launched on other streams than a step's own, and whether streams wait for each other around it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from longcat_core.null_gpu import launches


class Elsewhere:
    """The streams of a thread, one of which is the step's: the one that is current at first."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        """By kernel, on other streams than the step's."""
        self._home = torch.cuda.current_stream()
        self._since = launches.counted()
        self._on_streams: Counter[Any] = Counter()
        self._waited_for: Counter[Any] = Counter()
        """Of those on a stream, how many the step's stream waits for."""
        self._recorded: dict[Any, tuple[Any, int]] = {}
        self._may_launch: set[Any] = set()
        self._too_early = 0

    def begin(self) -> None:
        """What follows may read what was launched before on the step's stream, and nothing later."""
        self._may_launch.clear()
        self._too_early = 0

    def unordered(self) -> int:
        """Launches since `begin` on a stream that had not waited for the step's since then, and any that the step's
        stream has not waited for; those are not told again."""
        self._look()
        left = (self._on_streams - self._waited_for).total()
        self._waited_for = self._on_streams.copy()
        return self._too_early + left

    def leave(self) -> None:
        """Before another stream becomes the current one."""
        self._look()

    def record(self, event: Any, stream: Any) -> None:
        self._look()
        self._recorded[event] = stream, self._on_streams[stream]

    def wait(self, event: Any, stream: Any) -> None:
        recorded_on, launched = self._recorded.get(event, (None, 0))
        if stream == self._home and recorded_on is not None:
            self._waited_for[recorded_on] = max(self._waited_for[recorded_on], launched)
        elif recorded_on == self._home:
            self._may_launch.add(stream)

    def _look(self) -> None:
        """At what was launched since the last look, which is all on the current stream."""
        now, stream = launches.counted(), torch.cuda.current_stream()
        if stream != self._home:
            new = now - self._since
            self.launched.update(new)
            self._on_streams[stream] += new.total()
            self._too_early += 0 if stream in self._may_launch else new.total()
        self._since = now


@contextmanager
def streams() -> Iterator[Elsewhere]:
    """Follow the streams of this thread while this lasts."""
    elsewhere, set_stream = Elsewhere(), torch.cuda.set_stream
    record, wait = torch.cuda.Event.record, torch.cuda.Event.wait

    def switch(stream: Any) -> None:
        elsewhere.leave()
        set_stream(stream)

    def record_and_note(event: Any, stream: Any = None) -> None:
        elsewhere.record(event, stream or torch.cuda.current_stream())
        record(event, stream)

    def wait_and_note(event: Any, stream: Any = None) -> None:
        elsewhere.wait(event, stream or torch.cuda.current_stream())
        wait(event, stream)

    with (
        mock.patch.object(torch.cuda, "set_stream", switch),
        mock.patch.object(torch.cuda.Event, "record", record_and_note),
        mock.patch.object(torch.cuda.Event, "wait", wait_and_note),
    ):
        yield elsewhere
