"""Notes of a model's forward passes: when each began, on how many tokens, and which experts it touched.

In an engine, prompts can be left out, so that decoding at a long context is measured without minutes of prefill before
it: a pass over prompts then returns random states, and attention finds random latents in the cache. Neither changes
how long a decode step takes.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest
import torch
from torch import Tensor

from benchmarks.floors import Routed
from tests.harness import ENGINE

WARM_UP, AFTER = 8, 4
"""Steps before and after those that are timed; experts are counted in them, so that counting is not timed."""


MOST_REQUESTS = 64
"""At once; a pass over more tokens has a prompt in it."""
READ_SECONDS = 1.0
"""For a few milliseconds memory can be twice as quick as it is for long."""


class Pass(NamedTuple):
    start: float
    """Seconds, of a clock that all processes have."""
    tokens: int
    threads: int
    """On which the model computes."""
    bytes_per_second: float = 0.0
    """Of memory, measured before the pass if it is the first one after those that are timed: where others share memory,
    it is quicker at one time than at another."""
    left_out: float = 0.0
    """Seconds in it that are not the model's."""
    routed: Routed | None = None
    """None where the experts were not counted."""


class Steps(NamedTuple):
    """Decode steps of one batch."""

    seconds: float
    """Of one, the median."""
    bytes_per_second: float | None
    """Of memory, right after them; None where it was not measured."""
    routed: Routed | None
    """What was chosen, where it was counted."""


@dataclass
class Notes:
    """Kept in files of a folder, as the model may run in another process than who reads them."""

    folder: Path
    steps: int
    """That are timed of each batch."""
    counts_experts: bool
    """Which a compiled model does not allow."""
    times_memory: bool = False
    """After the steps that are timed."""
    streams: bool = False
    """Whether each layer reads what a processor's cache does not hold, as a larger model's weights; that is not in the
    times. It needs `counts_experts`."""
    _left_out: float = 0.0
    _lines: TextIO | None = None
    _tokens_before: int = 0
    """Of the last pass."""
    _same: int = 0
    """Passes in a row, before this one, over as many tokens."""
    _ids: list[Tensor] | None = None
    """Each layer's choices in the pass that runs; None where they are not counted."""
    _pools: list[Any] = field(default_factory=list)
    """SGLang's, of the cache."""
    _are_caches_filled: bool = False
    _read: Tensor | None = None

    @property
    def _passes(self) -> Path:
        return self.folder / "passes"

    @property
    def _leaves_out(self) -> Path:
        return self.folder / "prompts-are-left-out"

    def leave_prompts_out(self) -> None:
        """From now on: every pass over more than `MOST_REQUESTS` tokens."""
        self._leaves_out.touch()

    def compute_prompts(self) -> None:
        self._leaves_out.unlink(missing_ok=True)

    def taken(self) -> list[Pass]:
        """Since it was last asked."""
        found = [_read(line) for line in self._passes.read_text().splitlines()] if self._passes.exists() else []
        self._passes.write_text("")
        return found

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """The engine of this process, before it makes its model."""
        package = f"longcat_{ENGINE}"
        models = import_module(f"{package}.model")
        # In vLLM this one chooses between the layers, what is compiled of them, and core's.
        model = models.LongcatFlashForCausalLM if ENGINE == "vllm" else models.LongcatModel
        call = model.__call__
        patch.setattr(model, "__call__", lambda *args, **kwargs: self._noted(call, *args, **kwargs))
        if self.counts_experts:
            device = type(import_module(f"{package}.devices").current())
            functions = device.router_functions
            patch.setattr(device, "router_functions", lambda this: self._counting(functions(this)))
        if ENGINE == "sglang":
            pool = import_module("sglang.srt.mem_cache.memory_pool").MLATokenToKVPool
            create = pool._create_buffers

            def create_and_note(this: Any) -> None:
                create(this)
                self._pools.append(this)

            patch.setattr(pool, "_create_buffers", create_and_note)

    def _noted(self, call: Any, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens = input_ids.shape[0]
        self._same = self._same + 1 if tokens == self._tokens_before else 0
        self._tokens_before = tokens
        is_timed = WARM_UP <= self._same < WARM_UP + self.steps
        is_after = self._same == WARM_UP + self.steps + 1
        rate = self._bytes_per_second() if is_after and self.times_memory else 0.0
        start = time.monotonic()
        self._ids = [] if self.counts_experts and not is_timed else None
        if tokens > MOST_REQUESTS and self._leaves_out.exists():
            self._fill_caches(model)
            norm = model.model.norm if ENGINE == "vllm" else model.norm
            states = torch.randn(tokens, norm.weight.shape[0]).to(norm.weight.dtype)
        else:
            states = call(model, input_ids, *args, **kwargs)
        words: list[float] = [start, tokens, torch.get_num_threads(), rate, self._left_out]
        self._left_out = 0.0
        if self._ids:
            words += routed_by(self._ids)
        if self._lines is None:
            self._lines = self._passes.open("a", buffering=1)
        self._lines.write(" ".join(map(str, words)) + "\n")
        return states

    def _bytes_per_second(self) -> float:
        numbers = self._numbers()
        start, times = time.monotonic(), 0
        while (now := time.monotonic()) < start + READ_SECONDS:
            numbers.sum()
            times += 1
        return times * numbers.nbytes / (now - start)

    def _numbers(self) -> Tensor:
        if self._read is None:
            self._read = torch.ones(1 << 26, dtype=torch.float32)
        return self._read

    def _counting(self, functions: Any) -> Any:
        def route(*args: Any, **kwargs: Any) -> Any:
            routing = functions.route(*args, **kwargs)
            if self._ids is not None:
                self._ids.append(routing.ids)
            if self.streams:
                start = time.monotonic()
                self._numbers()[: 1 << 24].sum()
                self._left_out += time.monotonic() - start
            return routing

        return functions._replace(route=route)

    def _fill_caches(self, model: Any) -> None:
        """Once, with numbers as large as real latents. Memory that was never written would be one page of zeros, read
        over and over from the processor's cache."""
        if self._are_caches_filled:
            return
        self._are_caches_filled = True
        of_modules = [getattr(module, "kv_cache", None) for module in model.modules()]  # vLLM's
        caches = [cache for cache in of_modules if isinstance(cache, Tensor)]
        caches += [cache for pool in self._pools for cache in pool.kv_buffer]
        if not caches:
            raise ValueError(f"no cache of {ENGINE}'s to fill")
        for cache in caches:
            cache.normal_()


def routed_by(layers: Sequence[Tensor]) -> Routed:
    """layers: integer [T, K] each, an FFN expert or -1."""
    return Routed(
        experts=statistics.mean(len(ids[ids >= 0].unique()) for ids in layers),
        choices=statistics.mean(float((ids >= 0).sum()) / ids.shape[0] for ids in layers),
    )


def decode_steps(passes: Sequence[Pass], requests: int, steps: int) -> Steps:
    """Between passes in which each request has one token.

    Raises:
        ValueError: if there are fewer steps than asked for.
    """
    found = _decoding(passes, requests)
    if len(found) <= WARM_UP + steps:
        raise ValueError(f"{len(found)} decode steps of {requests} requests, wanted {WARM_UP + steps + 1}")
    timed = found[WARM_UP : WARM_UP + steps + 1]
    seconds = statistics.median(after.start - before.start - before.left_out for before, after in pairwise(timed))
    rate = next((each.bytes_per_second for each in found if each.bytes_per_second), None)
    counted = [each.routed for each in found if each.routed is not None]
    if not counted:
        return Steps(seconds, rate, None)
    routed = Routed(
        experts=statistics.mean(each.experts for each in counted),
        choices=statistics.mean(each.choices for each in counted),
    )
    return Steps(seconds, rate, routed)


def prefill_seconds(passes: Sequence[Pass]) -> float:
    """From the first pass of a prompt to the first decode step after it."""
    return _decoding(passes, 1)[0].start - passes[0].start


def _decoding(passes: Sequence[Pass], requests: int) -> list[Pass]:
    """Those after the last pass over prompts, as long as no request has ended."""
    first = max((n + 1 for n, each in enumerate(passes) if each.tokens > requests), default=0)
    return [each for each in passes[first:] if each.tokens == requests]


def _read(line: str) -> Pass:
    start, tokens, threads, rate, left_out, *routed = line.split()
    choices = Routed(*map(float, routed)) if routed else None
    return Pass(float(start), int(tokens), int(threads), float(rate), float(left_out), choices)
