"""What vLLM's `/metrics` show of LongCat's own: experts that tokens take, the dial; where processes share counters."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector
from torch import Tensor
from vllm.logger import init_logger

from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters
from longcat_core.observation.expert_choices import ExpertChoices
from longcat_core.observation.publication import Publication
from longcat_vllm import placement

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

logger = init_logger(f"vllm.{__name__}")

METRICS_DIRECTORY = "LONGCAT_METRICS_DIRECTORY"
"""Environment variable: the directory in which the processes of a server share their counters."""
_directory: tempfile.TemporaryDirectory[str] | None = None


def collect() -> None:
    """Have this process's `/metrics` show what is in the directory; harmless when called again."""
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="longcat-metrics-")
        os.environ[METRICS_DIRECTORY] = _directory.name
        MultiProcessCollector(REGISTRY, _directory.name)


def shared_directory() -> Path | None:
    """That of a server, None in an engine's process that no server has started. vLLM has one of its own where several
    API servers share their counters."""
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(METRICS_DIRECTORY, "")
    return Path(directory) if directory and Path(directory).is_dir() else None


def count_where_statistics_are_logged(original: Callable[..., None], manager: Any, *args: Any, **kwargs: Any) -> None:
    """As a server is about to start its engines: with --disable-log-stats nothing is counted."""
    vllm_config: VllmConfig = kwargs["vllm_config"]
    if kwargs["log_stats"] and not _hindered(vllm_config):
        collect()
        # A field of the configuration reaches all processes, and vLLM's cache of compiled graphs.
        hf_config: Any = vllm_config.model_config.hf_config
        hf_config.longcat_counts_choices = True
    original(manager, *args, **kwargs)


def _hindered(vllm_config: VllmConfig) -> bool:
    if vllm_config.model_config.enable_sleep_mode:
        logger.warning("The experts that tokens take are not counted: with --enable-sleep-mode memory comes and goes.")
    return vllm_config.model_config.enable_sleep_mode


def are_counted_here(vllm_config: VllmConfig) -> bool:
    """Whether this rank counts choices. Ranks of a tensor-parallel group have the same tokens, and the first counts,
    unless each of them sends a share to experts of other ranks (then all do), or holds a share of the cache (then those
    that hold one of it together: `CountedChoices.add`)."""
    from vllm.distributed import get_tensor_model_parallel_rank

    if not getattr(vllm_config.model_config.hf_config, "longcat_counts_choices", False) or shared_directory() is None:
        return False
    parallel = vllm_config.parallel_config
    counting = parallel.decode_context_parallel_size
    return parallel.use_sequence_parallel_moe or get_tensor_model_parallel_rank() < counting


FIRST_SLOT = 0
"""A row is a token if its slot in the cache is this or a later one. Slots are written on the device before each step,
captured or not; a row that only pads the step has -1, as have all rows of a dummy run."""


def slots_of_step() -> Tensor | None:
    """int64 [T] or fewer, of the first rows of the step that runs now; None where the cache is not there yet."""
    from vllm.forward_context import get_forward_context

    slots = get_forward_context().slot_mapping
    if not slots:
        return None
    assert isinstance(slots, dict), "each microbatch has a forward context of its own"
    return next(iter(slots.values()))


def rows_that_are_tokens() -> Tensor | None:
    """int64, 1 for a token, of the rows of `slots_of_step`."""
    slots = slots_of_step()
    return None if slots is None else (slots >= FIRST_SLOT).long()


class CountedChoices:
    """The choices of this rank's layers, from the forward context of each step; and their dial, if they have one."""

    def __init__(
        self, vllm_config: VllmConfig, config: LongcatConfig, layers: range, dialled: DialledRouters | None = None
    ) -> None:
        from vllm.distributed import get_ep_group

        parallel = vllm_config.parallel_config
        # Where experts move, ids are of experts and not of places, and how busy ranks are is vLLM's `log_balancedness`.
        has_fixed_places = parallel.enable_expert_parallel and not parallel.enable_eplb
        ranks = get_ep_group().world_size if has_fixed_places else 1
        device = torch.get_default_device()
        num_places = placement.num_places(vllm_config.model_config, config)
        self._choices = ExpertChoices(layers, config.moe_topk, num_places, ranks, device, FIRST_SLOT)
        self._is_shared_out = parallel.use_sequence_parallel_moe
        served_name = vllm_config.model_config.served_model_name
        assert isinstance(served_name, str), "ModelConfig takes the first of several names"
        directory = shared_directory()
        assert directory is not None, "are_counted_here has seen it"
        labels = {"model_name": served_name, "engine": str(parallel.data_parallel_index)}
        dial = None if dialled is None else dialled.dial
        self.publication = Publication(self._choices, directory, labels, dial)

    def add(self, ids: Tensor | list[Tensor], rows: int) -> None:
        """ids: int32 [T, K] of each layer, or [layers, T, K], by place if that is fixed, where T is `rows`, or this
        rank's share of them."""
        slots = slots_of_step()
        if slots is None:
            return
        if self._is_shared_out:
            from vllm.model_executor.models.utils import sequence_parallel_chunk

            # From 1, as vLLM pads with zeros what does not divide.
            chunk = sequence_parallel_chunk(F.pad(slots + 1, (0, rows - len(slots))).unsqueeze(1))
            slots = chunk.squeeze(1) - 1
        self._choices.add(ids, slots)


def begin_when_warm(original: Callable[..., Any], worker: WorkerBase, *args: Any, **kwargs: Any) -> Any:
    """Show the counts from when the last graph is captured."""
    times = original(worker, *args, **kwargs)
    counted: CountedChoices | None = getattr(worker.get_model(), "counted", None)
    if counted is not None:
        counted.publication.begin()
    return times
