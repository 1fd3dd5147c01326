"""LongCat's router and experts against SGLang's FusedMoE: zero experts are dropped before any kernel sees them."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.runtime_context import get_parallel
from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer
from sglang.srt.utils import add_prefix, get_device
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.layers.experts import Shortcut, add_identity, identity_share
from longcat_core.layers.routing import Routing
from longcat_sglang import devices, placement
from longcat_sglang.devices.branch import Begun
from longcat_sglang.quantization import LongcatFp8Config


class LongcatMoE(nn.Module):
    """Router, FFN experts and zero experts of one layer, in the three steps of `devices.branch.Branch`."""

    def __init__(
        self, config: LongcatConfig, layer_id: int, quant_config: LongcatFp8Config | None, prefix: str
    ) -> None:
        super().__init__()
        self.config, self.layer_id = config, layer_id
        self.router = LongcatRouter(config, prefix=add_prefix("router", prefix))
        self.route = devices.current().router_functions().route
        name = add_prefix("experts", prefix)
        quant_config = quant_config if quant_config is not None and quant_config.keeps_experts(name) else None
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=placement.num_places(config),
            top_k=config.moe_topk,
            layer_id=layer_id,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_ffn_hidden_size,
            quant_config=quant_config,
            inplace=False,  # the dense branch reads the same input
            prefix=name,
            **devices.current().expert_arguments(quant_config),
        )
        _skip_zero_experts(self.experts, config)
        self.branch = devices.current().branch()

    def begin(self, hidden_states: Tensor, choices: list[Tensor] | None = None) -> Begun:
        """As `forward`, whose result `end` returns. The device decides what runs in which of the three steps."""
        return self.branch.begin(self, hidden_states, choices)

    def compute(self, begun: Begun) -> Begun:
        return self.branch.compute(self, begun)

    def end(self, computed: Begun) -> Shortcut:
        return self.branch.end(self, computed)

    def forward(self, hidden_states: Tensor, choices: list[Tensor] | None = None) -> Shortcut:
        """hidden_states: [T, H]; choices: where the ids of the routing are to be noted."""
        routing, chosen = self.choose(hidden_states, choices)
        return self.shortcut(self.experts(hidden_states, chosen), hidden_states, routing)

    def choose(self, hidden_states: Tensor, choices: list[Tensor] | None) -> tuple[Routing, StandardTopKOutput]:
        """The routing, and what of it SGLang's experts take."""
        logits = self.router(hidden_states)
        routing = self.route(
            logits,
            self.router.bias,
            n_routed_experts=self.config.n_routed_experts,
            top_k=self.config.moe_topk,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )
        places = placement.place_ids(routing.ids, self.layer_id)
        self.note(routing.ids, choices, places)
        return routing, StandardTopKOutput(routing.weights, places, logits)

    def shortcut(self, routed: Tensor, hidden_states: Tensor, routing: Routing) -> Shortcut:
        """routed: [T, H], what the FFN experts make of `hidden_states`."""
        if get_moe_a2a_backend().is_none():
            return Shortcut(routed, identity_share(hidden_states, routing.identity))
        return Shortcut(None, add_identity(routed, hidden_states, routing.identity))

    def note(self, ids: Tensor, choices: list[Tensor] | None, places: Tensor | None = None) -> None:
        """Tell SGLang which experts were chosen, as its own `select_experts` does; to it too -1 is no expert. choices:
        where else they are to be noted; places: of the experts, if these are not where their numbers say."""
        places = ids if places is None else places
        if choices is not None:
            choices.append(places)
        get_global_expert_distribution_recorder().on_select_experts(topk_ids=places)
        capturer = get_global_experts_capturer()
        if capturer is not None:
            capturer.capture(self.layer_id, ids)


class LongcatRouter(nn.Module):
    dialled: Tensor | None = None
    """What a dial makes of the bias, written before each step."""

    def __init__(self, config: LongcatConfig, prefix: str) -> None:
        super().__init__()
        self.classifier = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            prefix=add_prefix("classifier", prefix),
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
        logits, _ = self.classifier(hidden_states.float())
        return logits


def _skip_zero_experts(experts: Any, config: LongcatConfig) -> None:
    """Have SGLang's FusedMoE skip ids of -1 even where it expects none.

    Its Triton runner filters ids only where a rank does not hold all experts: to the runner, the zero experts are
    experts that no rank holds (moe_runner/triton.py, `filter_expert`). Its dispatcher looks ids up in a table of the
    FFN experts, where -1 is the last entry: one more entry makes that -1 again (token_dispatcher/standard.py).

    With --enable-torch-compile a step of one token would gather the weights of each id, of -1 those of the last expert
    (moe/fused_moe_native.py): a product for each zero expert, and a wrong one for each expert of another rank.
    """
    experts.moe_runner_config.num_experts = experts.num_experts + config.zero_expert_num
    if hasattr(experts.quant_method, "_torch_compile_forward"):
        experts.quant_method._torch_compile_forward = _kernel_as_without_torch_compile
    parallel = get_parallel()
    if parallel.moe_ep_size > 1 and get_moe_a2a_backend().is_none():
        local = experts.num_experts // parallel.moe_ep_size
        table = torch.full((experts.num_experts + 1,), -1, dtype=torch.int32, device=get_device())
        first = parallel.moe_ep_rank * local
        table[first : first + local] = torch.arange(local, dtype=torch.int32)
        experts.dispatcher.local_expert_mapping = table


def _kernel_as_without_torch_compile(num_tokens: int) -> None:
    """SGLang's answer for steps of more than one token: none but the kernel that is called anyway."""
