"""Where experts are: our option for that, settled beforehand, and the places of experts that tokens choose."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.parallel import location, placement
from longcat_core.plugin.engine import refuse
from longcat_vllm import loading, requested

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

FIELD = "longcat_places"
"""Of the model's configuration, where a file says where experts are."""
OPTION = requested.OPTIONS["init_expert_location"]


def settle(vllm_config: VllmConfig, longcat: LongcatConfig) -> None:
    """Read where experts are, or place them by their counts, once for all ranks.

    A field of the model's configuration reaches all processes, and vLLM's cache of compiled graphs, which have the
    shapes of the tables in them.

    Raises:
        ValueError: if experts are not shared by ranks, or the file is not for this model and these ranks.
    """
    given, parallel = requested.of(vllm_config).init_expert_location, vllm_config.parallel_config
    if given is None:
        return
    ranks, problems = 1, list[str]()
    if parallel.enable_expert_parallel:
        ranks = parallel.tensor_parallel_size * parallel.data_parallel_size * parallel.prefill_context_parallel_size
    if ranks == 1:
        problems.append(
            "one rank has every expert; give --enable-expert-parallel with --tensor-parallel-size or "
            "--data-parallel-size"
        )
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


class Placed(nn.Module):
    """The places of a layer's FFN experts."""

    def __init__(self, places: list[int], experts: int) -> None:
        super().__init__()
        self.of_experts = [[n for n, held in enumerate(places) if held == expert] for expert in range(experts)]
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
