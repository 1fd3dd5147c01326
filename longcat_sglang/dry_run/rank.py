"""One process as one rank of a deployment: SGLang's groups of ranks, without the others."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

from sglang.srt.distributed import parallel_state

from longcat_core.null_gpu import world


def become(rank: int, ranks: int) -> None:
    """Make this process one rank of all, in groups whose other ranks do what it does."""
    world.join(rank, ranks)
    original = parallel_state.GroupCoordinator.__init__

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("use_message_queue_broadcaster", None)  # whose readers would be waited for
        original(self, *args, **kwargs)

    parallel_state.GroupCoordinator.__init__ = alone  # type: ignore[method-assign]
    parallel_state.in_the_same_node_as = _all_in_one_node


def _all_in_one_node(pg: Any, source_rank: int = 0) -> list[bool]:
    return [True] * pg.size()
