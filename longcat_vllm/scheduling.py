"""vLLM's schedulers, saying in what they send to workers how many requests wait, for a dial between two bounds."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from longcat_vllm.speculation import GATE_SCHEDULER, GateScheduler


class _SaysWhatWaits(Scheduler):
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        step = super().schedule(*args, **kwargs)
        _, step.longcat_waiting = self.get_request_counts()  # type: ignore[attr-defined]  # pickled as its fields are
        return step


class _Async(_SaysWhatWaits, AsyncScheduler): ...


class _Gated(_SaysWhatWaits, GateScheduler): ...


def scheduler(*, vllm_config: VllmConfig, **others: Any) -> Scheduler:
    """The one that vLLM would choose, which it has not settled when its options are checked."""
    chosen = _Async if vllm_config.scheduler_config.async_scheduling else _SaysWhatWaits
    return chosen(vllm_config=vllm_config, **others)


def gated_scheduler(**options: Any) -> Scheduler:
    """Instead of `GateScheduler`."""
    return _Gated(**options)


def say_what_waits(vllm_config: VllmConfig) -> None:
    """Have the engine's scheduler do so."""
    config = vllm_config.scheduler_config
    chosen = gated_scheduler if config.scheduler_cls == GATE_SCHEDULER else scheduler
    config.scheduler_cls = f"{__name__}.{chosen.__name__}"
