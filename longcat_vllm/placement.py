"""Where experts are: our options for that and vLLM's, settled beforehand, and the places of experts that tokens
choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.parallel import location, placement
from longcat_core.plugin.engine import refuse
from longcat_vllm import devices, loading, requested

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

FIELD = "longcat_places"
"""Of the model's configuration, where a file says where experts are."""
OPTION = requested.OPTIONS["init_expert_location"]
_ONE_RANK = (
    "one rank has every expert; give --enable-expert-parallel with --tensor-parallel-size or --data-parallel-size"
)


def settle(vllm_config: VllmConfig, longcat: LongcatConfig) -> None:
    """Settle whether experts move, and where they are if a file says it.

    Raises:
        ValueError: for what vLLM would get wrong, or fail over in its workers.
    """
    _settle_moves(vllm_config, longcat)
    _settle_places(vllm_config, longcat)


def _settle_moves(vllm_config: VllmConfig, longcat: LongcatConfig) -> None:
    """Of vLLM's --enable-eplb, or of what stands for it on a CPU."""
    asked, device, parallel = requested.of(vllm_config), devices.current(), vllm_config.parallel_config
    ranks, option = _ranks(parallel), "enable_eplb"
    if asked.eplb is not None:
        option = requested.OPTIONS["eplb"]
        obstacles = [_ONE_RANK] if ranks == 1 else []
        obstacles += device.obstacles_to_eplb(vllm_config, asked.eplb)
        refuse([f"{option}: {obstacle}, or leave it out" for obstacle in obstacles])
        device.prepare_eplb(vllm_config, asked.eplb)
    if not parallel.enable_eplb:
        return
    problems = list[str]()
    experts, redundant = longcat.n_routed_experts, parallel.eplb_config.num_redundant_experts
    if (experts + redundant) % ranks:
        problems.append(
            f"{experts} FFN experts and {redundant} redundant ones, wanted a multiple of the {ranks} ranks that share "
            "them; correct num_redundant_experts"
        )
    if asked.init_expert_location is not None:
        problems.append(f"vLLM begins with experts in their order; leave {OPTION} out")
    if (load_format := vllm_config.load_config.load_format) in loading.SHARDED:
        problems.append(f"{load_format!r} has experts where they were when it was saved; leave --load-format out")
    if parallel.enable_elastic_ep:
        problems.append("ranks that come and go would be given no experts; leave --enable-elastic-ep out")
    if not vllm_config.use_v2_model_runner:  # whose `eplb_step` is at the end of `sample_tokens` (vLLM 0.32)
        if parallel.pipeline_parallel_size > 1:
            problems.append(
                "this model runner moves experts of the last stage only; leave --pipeline-parallel-size out"
            )
        if vllm_config.model_config.runner_type == "pooling":
            problems.append("this model runner moves no experts where nothing is sampled; leave --runner out")
    refuse([f"{option}: {problem}, or leave it out" for problem in problems])


def _settle_places(vllm_config: VllmConfig, longcat: LongcatConfig) -> None:
    """Read where experts are, or place them by their counts, once for all ranks.

    A field of the model's configuration reaches all processes, and vLLM's cache of compiled graphs, which have the
    shapes of the tables in them.

    Raises:
        ValueError: if experts are not shared by ranks, or the file is not for this model and these ranks.
    """
    given, parallel = requested.of(vllm_config).init_expert_location, vllm_config.parallel_config
    if given is None:
        return
    ranks = _ranks(parallel)
    problems = [_ONE_RANK] if ranks == 1 else []
    if parallel.expert_placement_strategy != "linear":
        problems.append(
            f"expert_placement_strategy is {parallel.expert_placement_strategy!r}, with which ranks have other places; "
            "leave --expert-placement-strategy out"
        )
    if parallel.enable_ep_weight_filter:
        problems.append("a rank would read the experts that it has in their order; leave --enable-ep-weight-filter out")
    if (load_format := vllm_config.load_config.load_format) in loading.SHARDED:
        problems.append(f"{load_format!r} has experts where they were when it was saved; leave --load-format out")
    refuse([f"{OPTION}: {problem}, or leave it out" for problem in problems])
    hf_config: Any = vllm_config.model_config.hf_config
    try:
        hf_config.longcat_places = _places(given, longcat, ranks).tolist()
    except ValueError as error:
        refuse([f"{OPTION}: {error}; correct it, or leave it out"])


def _ranks(parallel: ParallelConfig) -> int:
    """On which the FFN experts of a layer are spread."""
    if not parallel.enable_expert_parallel:
        return 1
    return parallel.tensor_parallel_size * parallel.data_parallel_size * parallel.prefill_context_parallel_size


def _places(given: str, longcat: LongcatConfig, ranks: int) -> Tensor:
    """int64 [layers, places], as `location.places_of`.

    Raises:
        ValueError: as `settle`.
    """
    content, sizes = location.read(given), (longcat.num_layers, longcat.n_routed_experts)
    has_places = location.PLACES in content
    places = location.places_of(content, *sizes).shape[1] if has_places else longcat.n_routed_experts
    if places % ranks:
        raise ValueError(f"{places} places in a layer, wanted a multiple of the {ranks} ranks that share them")
    if has_places:
        return location.places_of(content, *sizes)
    rows = location.counts_of(content, sizes).numpy()
    return torch.from_numpy(placement.place(rows, ranks).physical_to_logical)


def num_places(model_config: ModelConfig, longcat: LongcatConfig) -> int:
    """Of the FFN experts of a layer, on all ranks."""
    places: list[list[int]] | None = getattr(model_config.hf_config, "longcat_places", None)
    return longcat.n_routed_experts if places is None else len(places[0])


def of_experts(places: Sequence[int], experts: int) -> list[list[int]]:
    """The places of each FFN expert. places: the expert in each of a layer's."""
    return [[n for n, held in enumerate(places) if held == expert] for expert in range(experts)]


class Placed(nn.Module):
    """The places of a layer's FFN experts."""

    def __init__(self, places: list[int], experts: int) -> None:
        super().__init__()
        self.of_experts = of_experts(places, experts)
        replicas = location.replicas_of(self.of_experts)
        self.places: Tensor
        self.counts: Tensor
        self.register_buffer("places", replicas.places, persistent=False)
        self.register_buffer("counts", replicas.counts, persistent=False)

    def __len__(self) -> int:
        return sum(map(len, self.of_experts))

    def forward(self, ids: Tensor) -> Tensor:
        """int32 [T, K], as in `Routing` -> int32 [T, K], the place of each expert."""
        return location.place_ids(ids, location.Replicas(self.places, self.counts))


def of_layer(prefix: str, longcat: LongcatConfig) -> Placed | None:
    """Of the layer that is built now; None where experts are in their order."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.models.utils import extract_layer_index

    hf_config = get_current_vllm_config().model_config.hf_config
    places: list[list[int]] | None = getattr(hf_config, "longcat_places", None)
    return None if places is None else Placed(places[extract_layer_index(prefix)], longcat.n_routed_experts)
