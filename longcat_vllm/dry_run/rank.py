"""One process as one rank of a deployment: vLLM's worker, without the others; and what it launches in each step."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from vllm.distributed import get_pp_group, parallel_state
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from longcat_core.null_gpu import world
from longcat_core.null_gpu.steps import Executed, counting


class OneRank(UniProcExecutor):
    """In place of the executor that would start every rank."""

    supports_pp: bool = True
    rank: ClassVar[int] = 0
    """In its data-parallel replica; the next one that is made has it."""
    latest: ClassVar[OneRank | None] = None
    """The one that was made last, if its weights are there, also where the engine has failed after that."""

    def _distributed_args(self) -> tuple[str, int, int]:
        return "mirror://", self.rank, self.rank

    def _init_executor(self) -> None:
        self.executed: list[Executed] = []
        OneRank.latest = None
        super()._init_executor()
        OneRank.latest = self

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        tokens = scheduler_output.num_scheduled_tokens
        self._scheduled = [request for request in tokens if tokens[request]]
        self.executed.append(Executed(sum(tokens.values()), len(self._scheduled)))
        if not get_pp_group().is_first_rank:
            self._receive(sum(tokens.values()))
        with self._counting():
            result = super().execute_model(scheduler_output, non_block)
            output = result.result() if isinstance(result, Future) else result
        if output is not None:
            output = self._with_tokens()
        if not non_block:
            return output
        done: Future[Any] = Future()
        done.set_result(output)
        return done

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        with self._counting():
            result = super().sample_tokens(grammar_output, non_block)
            output = result.result() if isinstance(result, Future) else result
            if isinstance(output, AsyncModelRunnerOutput):
                output.get_output()
        if not non_block:
            return self._with_tokens()
        done: Future[Any] = Future()
        done.set_result(self._with_tokens())
        return done

    def _receive(self, tokens: int) -> None:
        """Give this stage what the one before it would have sent."""
        worker: Any = self.driver_worker.worker
        model, dtype = worker.get_model(), self.vllm_config.model_config.dtype
        received = model.make_empty_intermediate_tensors(tokens, dtype, worker.device).tensors
        get_pp_group().irecv_tensor_dict = lambda *args, **kwargs: (received, [], [])  # type: ignore[method-assign]

    def _with_tokens(self) -> ModelRunnerOutput:
        """A token for each request, as no kernel has sampled one, and a stage that is not the last has none."""
        return ModelRunnerOutput(
            req_ids=self._scheduled,
            req_id_to_index={request: i for i, request in enumerate(self._scheduled)},
            sampled_token_ids=[[1] for _ in self._scheduled],
        )

    def _counting(self) -> AbstractContextManager[None]:
        worker: Any = self.driver_worker.worker
        return counting(self.executed[-1], worker.get_model())


def become(rank: int, ranks_of_replica: int, ranks: int) -> None:
    """Make this process one rank of all, in groups whose other ranks do what it does."""
    world.join_groups_of(parallel_state, rank, ranks)
    OneRank.rank = rank % ranks_of_replica
