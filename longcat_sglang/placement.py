"""Where experts are: SGLang's options for that, checked beforehand, our policy, and the places of experts chosen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longcat_core.config import LongcatConfig
from longcat_core.parallel import location
from longcat_core.parallel.placement import place_while_serving
from longcat_core.plugin.options import Option, Outcome

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata
    from torch import Tensor

    from longcat_sglang.devices.base import Device

IN_ORDER = "trivial"
"""What --init-expert-location is where nothing is given."""
OURS = "auto"
"""What --eplb-algorithm is where nothing is given: then experts are placed by our policy."""
ALGORITHMS = ("deepseek", "deepseek_vec", "elasticity_aware")
"""SGLang's own that can place experts which are in no groups, as LongCat's are not."""

_KNOWN_BY = "two ranks on a CPU, in the tests; a GPU: read in SGLang 0.5.21"
SERVED: tuple[Option, ...] = (
    Option(
        "--enable-eplb",
        Outcome.SERVED,
        "SGLang counts rows of FFN experts, and moves experts between ranks. A choice of a zero expert is no row.",
        _KNOWN_BY,
    ),
    Option(
        f"--eplb-algorithm {OURS}",
        Outcome.SERVED,
        "Our policy, which leaves experts where they are if a move brings nothing. SGLang's own are served as well: "
        f"{', '.join(f'`{name}`' for name in ALGORITHMS)}.",
        f"{_KNOWN_BY}; SGLang's own algorithms: read",
    ),
    Option(
        "--init-expert-location FILE",
        Outcome.WITH_EXCEPTIONS,
        "Places of experts, as `longcat place` writes them, or counts, from which they are placed as --eplb-algorithm "
        "says. Refused where it is not of this model's experts, or one rank has them all. A zero expert has no place.",
        _KNOWN_BY,
    ),
    Option(
        "--ep-num-redundant-experts",
        Outcome.SERVED,
        "Every replica is loaded. Without --init-expert-location and --enable-eplb tokens go to the first of each, as "
        "in SGLang, or with --ep-dispatch-algorithm dynamic to all in turn.",
        _KNOWN_BY,
    ),
    Option("--expert-distribution-recorder-mode stat", Outcome.SERVED, "Only FFN experts are counted.", _KNOWN_BY),
)


def problems(settings: Any, longcat: LongcatConfig) -> list[str]:
    """What is wrong with --ep-size and the options that place experts. SGLang would fail over it in its workers, or,
    where the places are not those of this model's experts, answer with other experts' outputs."""
    found, experts = list[str](), longcat.n_routed_experts
    given, redundant = settings.init_expert_location, settings.ep_num_redundant_experts
    # With an all-to-all, SGLang spreads experts over all ranks, whatever --ep-size says, and settles that later.
    ranks = settings.ep_size if settings.moe_a2a_backend == "none" else settings.tp_size
    if (experts + redundant) % ranks:
        of_which = f", of which {redundant} are redundant" if redundant else ""
        found.append(
            f"ep_size: {ranks}, wanted a divisor of the {experts + redundant} FFN experts{of_which}; give --ep-size one"
        )
    if ranks == 1:
        options = {
            "--enable-eplb": settings.enable_eplb,
            "--ep-num-redundant-experts": redundant,
            "--init-expert-location": given != IN_ORDER,
        }
        found += [
            f"ep_size: 1, wanted more for {option}, as one rank has every expert; give --ep-size, or leave {option} out"
            for option, is_given in options.items()
            if is_given
        ]
    if settings.enable_eplb or given != IN_ORDER:
        found += _problems_with_policy(settings.eplb_algorithm, longcat, ranks, redundant)
    if given != IN_ORDER and settings.load_format == "sharded_state":
        found.append(
            "load_format: 'sharded_state', which has experts where they were when it was saved, wanted another with "
            "--init-expert-location; leave one of them out"
        )
    if given != IN_ORDER:
        try:
            _check(given, longcat, redundant)
        except ValueError as error:
            found.append(f"init_expert_location: {error}; correct it, or leave --init-expert-location out")
    return found


def _problems_with_policy(algorithm: str, longcat: LongcatConfig, ranks: int, redundant: int) -> list[str]:
    if algorithm not in (OURS, *ALGORITHMS):
        wanted = ", ".join((OURS, *ALGORITHMS))
        return [f"eplb_algorithm: {algorithm!r}, wanted one of {wanted}; give one, or leave --eplb-algorithm out"]
    most = longcat.n_routed_experts * (ranks - 1)
    if algorithm == OURS and ranks > 1 and redundant > most:
        return [
            f"ep_num_redundant_experts: {redundant}, wanted at most {most}, with which every rank has every expert; "
            f"give --ep-num-redundant-experts fewer, or --eplb-algorithm {ALGORITHMS[0]}"
        ]
    return []


def _check(given: str, longcat: LongcatConfig, redundant: int) -> None:
    """
    Raises:
        ValueError: if these are not places, or counts, of this model's experts.
    """
    sizes, experts = (longcat.num_layers, longcat.n_routed_experts), longcat.n_routed_experts
    content = location.read(given)
    if location.PLACES not in content:
        location.counts_of(content, sizes)
        return
    if (places := location.places_of(content, *sizes).shape[1]) != experts + redundant:
        raise ValueError(
            f"{places} places in a layer, wanted {experts + redundant}, for {experts} FFN experts and "
            f"--ep-num-redundant-experts {redundant}"
        )


def num_places(longcat: LongcatConfig) -> int:
    """Of the FFN experts of a layer, on all ranks."""
    from sglang.srt.runtime_context import get_exec

    redundant: int = get_exec().moe.ep_num_redundant_experts
    return longcat.n_routed_experts + redundant


def place_by_load(
    original: Callable[..., ExpertLocationMetadata], model_config: ModelConfig, logical_count: Any, **kwargs: Any
) -> ExpertLocationMetadata:
    """Where experts are to be by how often they were chosen, unless one of SGLang's own algorithms is asked for.

    logical_count: [layers, experts], or of each of some steps, alike on all ranks. Each rank places some of the layers,
    from which all get the same places, and sooner.
    """
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata, get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_device, get_exec, get_parallel

    moe, parallel = get_exec().moe, get_parallel()
    if moe.eplb_algorithm != OURS:
        return original(model_config, logical_count, **kwargs)
    counts = torch.as_tensor(logical_count)
    counts = counts.reshape(-1, *counts.shape[-2:])
    _, layers, experts = counts.shape
    now, ranks_a_node = get_global_expert_location_metadata(), parallel.ep_size // parallel.nnodes
    if ranks_a_node * parallel.nnodes != parallel.ep_size:  # not every rank's experts are on one node
        ranks_a_node = parallel.ep_size
    places = torch.zeros(layers, experts + moe.ep_num_redundant_experts, dtype=torch.int64)
    for layer in range(dist.get_rank(), layers, dist.get_world_size()):
        placed = place_while_serving(
            counts[:, layer].double().cpu().numpy(),
            parallel.ep_size,
            moe.ep_num_redundant_experts,
            ranks_a_node=ranks_a_node,
            current=None if now is None else now.physical_to_logical_map_cpu[layer].numpy(),
        )
        places[layer] = torch.from_numpy(placed)
    places = places.to(get_device().device)
    dist.all_reduce(places)
    return ExpertLocationMetadata.init_by_mapping(model_config, places)


def weights_of(layers: Iterable[Any], device: Device) -> dict[int, list[Tensor]]:
    """Parameters of the experts of each layer, their scales too, each [places of this rank, ...]. Where a device has
    packed them they are unpacked, to be packed at their next use."""
    found: dict[int, list[Tensor]] = {}
    for number, layer in enumerate(layers):
        experts = layer.mlp.experts
        device.restore_experts(experts)
        found[number] = [weight.data for weight in experts.parameters()]
    return found


def place_ids(ids: Tensor, layer_id: int) -> Tensor:
    """The place of each expert chosen, as SGLang's own router looks it up, which takes -1 for the last expert.

    ids: int32 [T, K], as in `Routing`. Returns int32 [T, K], of a zero expert -1 still.
    """
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo, topk_ids_logical_to_physical
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.ep_dispatch_algorithm is None:
        return ids
    info = ExpertLocationDispatchInfo.init_new(layer_id)
    return topk_ids_logical_to_physical(ids.clamp(min=0), info).where(ids >= 0, -1)
