"""Experts that move between ranks while vLLM serves on a CPU, for which vLLM has the parts but does not put them
together."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_ep_group
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.worker.cpu_worker import CPUWorker

from longcat_core.parallel.location import Replicas, place_ids
from longcat_vllm import requested


class BalancingWorker(CPUWorker):
    """`CPUModelRunner.load_model` is one of its own, and leaves out what the runner's later steps ask for with
    --enable-eplb (vLLM 0.32)."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        require_one_layout([layer.routed_experts for layer in runner.model.moe_layers])
        runner._moe_model, runner.eplb_state = runner.model, EplbState(runner.parallel_config, runner.device)
        runner.eplb_state.add_model(runner.model, runner.model_config)


def require_one_layout(layers: Iterable[Any]) -> None:
    """On all ranks, as experts move as they are. layers: the `RoutedExperts` of this rank.

    Raises:
        ValueError: on all ranks, if there are several.
    """
    here = {f"{layer.cpu_kernel} in {str(layer.w13_weight.dtype).removeprefix('torch.')}" for layer in layers}
    group = get_ep_group()
    of_ranks: list[set[str]] = [set()] * group.world_size
    torch.distributed.all_gather_object(of_ranks, here, group=group.cpu_group)
    if len(found := set().union(*of_ranks)) > 1:
        raise ValueError(
            f"experts are in the layouts of several kernels, {', '.join(sorted(found))}, wanted one, as they move "
            f"between ranks as they are; serve them in bf16, or leave {requested.OPTIONS['eplb']} out"
        )


def place_and_count(ids: Tensor, state: EplbLayerState) -> Tensor:
    """int32 [T, K], as in `Routing` -> int32 [T, K], the place of each expert. Counts rows by place, if that is on.

    vLLM's own does nothing on a CPU (`eplb_map_to_physical_and_record` in router/base_router.py).
    """
    (tokens,) = state.num_unpadded_tokens_tensors or (None,)  # as many as microbatches: one on a CPU
    return torch.ops.longcat.place_and_count(
        ids,
        state.expert_load_view,
        state.logical_to_physical_map,
        state.logical_replica_count,
        state.should_record_tensor,
        tokens,
    )


def _place_and_count(
    ids: Tensor, rows: Tensor, places: Tensor, counts: Tensor, is_counted: Tensor, tokens: Tensor
) -> Tensor:
    """rows: int32 [places], to which those of the first `tokens` rows of ids are added; places: int64 [experts, most
    places of one]; counts: int64 [experts]; is_counted: a bool. What is counted depends on the routing, so
    torch.compile must not look inside."""
    placed = place_ids(ids, Replicas(places, counts))
    if is_counted:
        chosen = placed[: int(tokens)]
        rows += torch.bincount(chosen[chosen >= 0], minlength=len(rows))
    return placed


def _place_and_count_fake(
    ids: Tensor, rows: Tensor, places: Tensor, counts: Tensor, is_counted: Tensor, tokens: Tensor
) -> Tensor:
    return torch.empty_like(ids)


_LIBRARY = torch.library.Library("longcat", "FRAGMENT")
direct_register_custom_op("place_and_count", _place_and_count, ["rows"], _place_and_count_fake, _LIBRARY)
