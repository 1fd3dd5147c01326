"""LongCat's router and experts against vLLM's FusedMoE: zero experts are dropped before any kernel sees them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import ParallelConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.interfaces import MixtureOfExperts
from vllm.model_executor.models.utils import sequence_parallel_chunk

from longcat_core.config import LongcatConfig
from longcat_core.layers.experts import Shortcut, add_identity, identity_share
from longcat_core.layers.routing import Routing
from longcat_core.weights.blocks import FP8
from longcat_vllm import devices, placement
from longcat_vllm.devices.branch import Branch
from longcat_vllm.quantization import LongcatFp8Config


class Begun(NamedTuple):
    """A layer's experts between two of their steps."""

    hidden_states: Tensor
    """[T, H]: what the experts read."""
    routing: Routing
    num_tokens: int
    """Of the layer, of which a rank of a tensor-parallel group may have a share."""
    step: Tensor
    """What the device's branch hands from a step to the next."""


class LongcatMoE(nn.Module):
    """Router, FFN experts and zero experts of one layer, in the three steps of `devices.branch.Branch`."""

    def __init__(
        self,
        config: LongcatConfig,
        parallel_config: ParallelConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.config = config
        self.is_sequence_parallel = parallel_config.use_sequence_parallel_moe
        self.router = LongcatRouter(config, prefix=f"{prefix}.router")
        self.route = devices.current().router_functions().route
        self.placed = placement.of_layer(prefix, config)
        num_experts = config.n_routed_experts if self.placed is None else len(self.placed)
        places = None if self.placed is None else self.placed.of_experts
        self.balancing: EplbLayerState | None = None
        self.balanced = devices.current().balanced
        redundant = 0
        if parallel_config.enable_eplb:
            self.balancing = EplbLayerState()
            redundant = parallel_config.eplb_config.num_redundant_experts
            first = EplbState.build_initial_global_physical_to_logical_map(num_experts, redundant)
            places = placement.of_experts(first, num_experts)
        self.experts = FusedMoEFactory(
            num_experts=num_experts,
            num_redundant_experts=redundant,
            enable_eplb=parallel_config.enable_eplb,
            top_k=config.moe_topk,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_ffn_hidden_size,
            renormalize=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
            router=PrecomputedRouting(config.moe_topk, num_experts + redundant, self.balancing),
            routed_experts_cls=ZeroExpertAwareExperts,
            routed_experts_args={"places": places},
            is_sequence_parallel=self.is_sequence_parallel,
            reduce_results=False,
        )
        self.branch = devices.current().branch(self.experts, parallel_config) or Whole(self.experts)

    def begin(self, hidden_states: Tensor, choices: list[Tensor] | None = None) -> Begun:
        """hidden_states: [T, H]; choices: where the ids of the routing are to be noted. Where tokens of data-parallel
        ranks go to experts of others, the ranks of a tensor-parallel group, which all have the same tokens, send a
        share of them each, as in vLLM's own models."""
        num_tokens, between = hidden_states.shape[0], hidden_states
        if self.is_sequence_parallel:
            hidden_states = sequence_parallel_chunk(hidden_states)
        routing = self.route(
            self.router(hidden_states),
            self.router.bias,
            n_routed_experts=self.config.n_routed_experts,
            top_k=self.config.moe_topk,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )
        if self.placed is not None:
            routing = routing._replace(ids=self.placed(routing.ids))
        if choices is not None:
            choices.append(routing.ids)
        if self.balancing is not None:
            routing = routing._replace(ids=self.balanced(routing.ids, self.balancing))
        return Begun(hidden_states, routing, num_tokens, self.branch.begin(hidden_states, routing, between))

    def compute(self, begun: Begun, between: Tensor) -> Begun:
        return begun._replace(step=self.branch.compute(begun.step, between))

    def end(self, computed: Begun, between: Tensor) -> Shortcut:
        hidden_states, routing, num_tokens, step = computed
        routed = self.branch.end(step, hidden_states, routing, between)
        if self.experts.moe_config.skip_final_all_reduce:
            return Shortcut(routed, identity_share(hidden_states, routing.identity))
        whole = add_identity(routed, hidden_states, routing.identity)
        if self.is_sequence_parallel:
            whole = tensor_model_parallel_all_gather(whole, 0)[:num_tokens]
        return Shortcut(None, whole)


class Whole(Branch):
    """vLLM's runner, which dispatches, computes and combines in one operator."""

    def __init__(self, experts: MoERunner) -> None:
        self._experts = experts

    def begin(self, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        return self._experts(hidden_states, PrecomputedRouting.pack(routing.weights, routing.ids))

    def compute(self, begun: Tensor, between: Tensor) -> Tensor:
        return begun

    def end(self, computed: Tensor, hidden_states: Tensor, routing: Routing, between: Tensor) -> Tensor:
        return computed


class LongcatRouter(nn.Module):
    dialled: Tensor | None = None
    """What a dial makes of the bias, written before each step."""

    def __init__(self, config: LongcatConfig, prefix: str) -> None:
        super().__init__()
        self.classifier = GateLinear(
            config.hidden_size,
            config.num_experts,
            out_dtype=torch.float32,
            params_dtype=torch.float32,
            prefix=f"{prefix}.classifier",
        )
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.product = devices.current().router_functions().product

    @property
    def bias(self) -> Tensor:
        """fp32 [FFN experts + zero experts], which takes part in the choice of experts."""
        return self.e_score_correction_bias if self.dialled is None else self.dialled

    def forward(self, hidden_states: Tensor) -> Tensor:
        """fp32 logits [T, FFN experts + zero experts]."""
        if self.product is not None:
            weight: Any = self.classifier.weight
            return self.product(hidden_states, weight)
        logits, _ = self.classifier(hidden_states)
        return logits


class PrecomputedRouting(BaseRouter):
    """Hands vLLM's runner a routing that the model has computed already.

    The model needs the routing itself, for the identity term; a router inside the runner sits in an opaque
    operator and could only return it as a side effect, which torch.compile does not see (vLLM's own
    ZeroExpertRouter does so). In place of router logits it passes the result of `pack`: [T, 2 K].
    """

    def __init__(self, top_k: int, num_experts: int, balancing: EplbLayerState | None = None) -> None:
        """balancing: of a layer whose experts move. vLLM fills in what is in the router, and gives one to routers that
        it makes itself only."""
        super().__init__(top_k=top_k, global_num_experts=num_experts, eplb_state=balancing)

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Unspecified  # keeps kernels with built-in routing away

    @staticmethod
    def pack(weights: Tensor, ids: Tensor) -> Tensor:
        return torch.cat((weights, ids.float()), dim=-1)

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = router_logits.split(self.top_k, dim=-1)
        return weights.contiguous(), ids.to(indices_type or torch.int32).contiguous()


class ZeroExpertAwareExperts(RoutedExperts):
    """vLLM's container of expert weights, with kernels that skip ids of -1.

    places: of each FFN expert when it is loaded, if it is not the one that has its number.
    """

    def __init__(self, *args: Any, places: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = places

    def weight_loader(  # type: ignore[override]  # vLLM's overloads
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Write a tensor of an expert wherever the expert is on this rank."""
        load = super().weight_loader
        places = [expert_id] if self._places is None else self._places[expert_id]
        written = [load(param, loaded_weight, weight_name, shard_id, place, return_success=True) for place in places]
        return any(written) if return_success else None

    def update_expert_map_info(self) -> None:
        """Keep an expert map also where experts are not spread over ranks, if the device's kernels need one."""
        super().update_expert_map_info()
        if self.expert_map_manager.expert_map is None:
            self._expert_map = devices.current().expert_map(self.global_num_experts, self.moe_config.device)

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        is_fp8 = isinstance(quant_config, LongcatFp8Config) and quant_config.keeps_experts(prefix, moe_config)
        choose = partial(super()._get_quant_method, prefix, quant_config if is_fp8 else None, moe_config)
        return devices.current().experts_method(choose, moe_config, is_fp8)

    def get_expert_weights(self) -> list[Tensor]:
        """What moves with an expert: [experts of this rank, numbers of each], those in FP8 as bytes, as gloo gathers no
        FP8."""
        return [weight.view(torch.uint8) if weight.dtype == FP8 else weight for weight in super().get_expert_weights()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """
        Raises:
            RuntimeError: if the weights are packed already, as loading them would pack them again, or experts move, as
                nothing in a saved state says where they are.
        """
        if self.moe_config.moe_parallel_config.enable_eplb:
            raise RuntimeError(
                f"{prefix}: experts move between ranks, and a saved state would not say where they are; serve without "
                "--enable-eplb to save it, or serve the checkpoint"
            )
        if devices.current().has_packed(self):
            raise RuntimeError(
                f"{prefix}: the weights of the experts are packed for this device's kernel, and would be packed "
                "again when they are loaded; save the state with --moe-backend triton on a GPU, or serve the checkpoint"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


def _form_of(weights: Iterable[Tensor]) -> str:
    return ", ".join(f"{list(weight.shape)} of {str(weight.dtype).removeprefix('torch.')}" for weight in weights)


class MovableExperts(MixtureOfExperts):
    """What vLLM's balancing asks of a model whose experts it moves, zero experts not among them."""

    num_expert_groups = 1
    num_shared_experts = 0

    def offer(self, layers: Iterable[LongcatMoE]) -> None:
        """layers: of this pipeline stage."""
        layers = list(layers)
        configs = [layer.experts.moe_config for layer in layers]
        self.expert_weights = []  # once there is something that moves them
        self.moe_layers = [layer.experts for layer in layers]
        self.num_moe_layers = len(layers)
        self.num_logical_experts = self.num_routed_experts = configs[0].num_logical_experts
        self.num_physical_experts = configs[0].num_experts
        self.num_local_physical_experts = configs[0].num_local_experts
        self.num_redundant_experts = self.num_physical_experts - self.num_logical_experts

    def set_eplb_state(
        self, expert_load_view: Tensor, logical_to_physical_map: Tensor, logical_replica_count: Tensor
    ) -> None:
        """
        Raises:
            RuntimeError: if vLLM has not reached a layer's router, which would balance nothing without a word, or the
                experts of a layer are not in the form of the first one's, as some in FP8 and some in bf16.
        """
        super().set_eplb_state(expert_load_view, logical_to_physical_map, logical_replica_count)
        first = _form_of(self.expert_weights[0])
        for number, (layer, weights) in enumerate(zip(self.moe_layers, self.expert_weights, strict=True)):
            if layer.eplb_state is None or layer.eplb_state.expert_load_view is None:
                raise RuntimeError(
                    f"the router of layer {number} of {self.num_moe_layers} has no state of --enable-eplb, wanted "
                    "vLLM's, without which no expert would move; leave --enable-eplb out"
                )
            if (found := _form_of(weights)) != first:
                raise RuntimeError(
                    f"the experts of layer {number} of {self.num_moe_layers} are {found}, wanted {first} as in layer "
                    "0, as vLLM moves those of all layers through one buffer; leave --enable-eplb out"
                )

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        raise NotImplementedError("--enable-elastic-ep, which deployment.check refuses")
