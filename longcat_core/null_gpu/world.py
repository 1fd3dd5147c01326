"""A process group of one process: every other rank is taken to do what this one does."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

BACKEND = "mirror"
COLLECTIVES: Counter[str] = Counter()
"""Of tensors on the device, through PyTorch's groups, since the process started; those of NCCL itself are launches."""


def _counted(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        COLLECTIVES[f"torch.distributed {name}"] += 1


class Done(Work):
    """Of a collective that is over when it begins."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self._result = result

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._result)
        return future


# PyTorch's stubs have overloads that it does not call.
# mypy: disable-error-code="override"


class Mirror(ProcessGroup):
    """What others gather, sum and broadcast is what this rank would. It is rank 0 of its groups, or has what their
    rank 0 sends: nothing is received."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # as PyTorch's own groups in Python do
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:  # noqa: N802  # PyTorch's name
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        for tensor in tensors:
            _counted("all_reduce", tensor)
            if tensor.device.type == "cpu" and opts is not None and opts.reduceOp == dist.ReduceOp.SUM:
                self._sum(tensor)
        return Done(tensors)

    def _sum(self, tensor: Tensor) -> None:
        """Of what each rank has, or, where this one has filled its own column alone, of all columns."""
        if tensor.dim() and tensor.shape[-1] == self._size:
            own = tensor[..., self._rank].clone()
            if tensor.count_nonzero() == own.count_nonzero():
                tensor.copy_(own.unsqueeze(-1).expand_as(tensor))
                return
        tensor.mul_(self._size)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        for each, own in zip(outputs, inputs, strict=True):
            _counted("all_gather", own)
            for output in each:
                output.copy_(own)
        return Done(outputs)

    def _allgather_base(self, output: Tensor, own: Tensor, opts: Any = None) -> Work:
        _counted("all_gather", own)
        output.view(self._size, -1).copy_(own.reshape(1, -1).expand(self._size, -1))
        return Done(output)

    all_gather_single = _allgather_base  # type: ignore[assignment]

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        return self.allgather(outputs, inputs) if outputs else Done()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return Done(tensors)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return Done(tensors)

    def _reduce_scatter_base(self, output: Tensor, own: Tensor, opts: Any = None) -> Work:
        _counted("reduce_scatter", own)
        return Done(output)

    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]

    def alltoall_base(self, output: Tensor, own: Tensor, *sizes: Any) -> Work:
        _counted("all_to_all", own)
        return Done(output)

    def barrier(self, opts: Any = None) -> Work:
        return Done()

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        return Done(tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        return Done(tensors)


_last_broadcast: list[Any] = []


def _broadcast_object_list(object_list: list[Any], src: int | None = None, group: Any = None, **options: Any) -> None:
    """What others broadcast is what this rank did, in ranks that broadcast in turn."""
    if src == dist.get_rank() or options.get("group_src") == dist.get_rank(group):
        _last_broadcast[:] = object_list
    else:
        object_list[:] = _last_broadcast[: len(object_list)]


def join_groups_of(parallel_state: Any, rank: int, size: int) -> None:
    """`join`, and have an engine's groups of ranks wait for no other.

    parallel_state: the engine's module of that name.
    """
    join(rank, size)
    original = parallel_state.GroupCoordinator.__init__

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("use_message_queue_broadcaster", None)  # whose readers would be waited for
        original(self, *args, **kwargs)

    parallel_state.GroupCoordinator.__init__ = alone
    parallel_state.in_the_same_node_as = _all_in_one_node


def _all_in_one_node(group: Any, source_rank: int = 0) -> list[bool]:
    return [True] * (group.size() if isinstance(group, ProcessGroup) else group.world_size)


def join(rank: int, size: int) -> None:
    """Make this process rank `rank` of `size`, and every process group that is made from now on a mirror."""
    dist.Backend.register_backend(
        BACKEND, lambda store, rank, size, timeout: Mirror(rank, size), devices=["cpu", "cuda"]
    )
    new_group = dist.new_group

    def mirrored(ranks: Any = None, timeout: Any = None, backend: Any = None, **options: Any) -> Any:
        return new_group(ranks, backend=BACKEND, group_desc=options.get("group_desc"))

    dist.new_group = mirrored  # type: ignore[assignment]
    dist.broadcast_object_list = _broadcast_object_list  # type: ignore[assignment]
    dist.monitored_barrier = lambda *args, **kwargs: None  # which is gloo's alone
    dist.init_process_group(BACKEND, rank=rank, world_size=size, store=FakeStore())
