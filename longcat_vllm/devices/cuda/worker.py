"""vLLM's worker of a GPU, with scratch memory of its own for experts that run beside the dense path."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from longcat_vllm.devices.cuda.overlap import LANE


class OverlapWorker(Worker):
    """The number of lanes is settled before the model is built (`Worker._init_workspace_and_model_runner` in 0.32), and
    no option sets it. A lane takes no memory before it is used."""

    def _make_model_runner(self) -> Any:
        assert self.device is not None, "it is set first"
        reset_workspace_manager()
        init_workspace_manager(
            self.device, num_lanes=LANE + 1, alloc_context=lambda: self._maybe_get_memory_pool_context("workspace")
        )
        return super()._make_model_runner()
