"""What steers the router while it learns: the controllers of its bias, and the balance loss over devices."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.nano.settings import Settings
from longcat_core.inspection import routers
from longcat_core.layers.routing import Routing, expert_rows
from longcat_core.reference import LongcatForCausalLM, Router


class Routed(NamedTuple):
    """What one layer's router did with the T tokens of a batch."""

    rows: Tensor
    """int64 [FFN experts]: tokens of each."""
    loss: Tensor | None
    """The balance loss, with its gradient, or None if it was not requested."""


class Watch:
    """Notes what every router of a model does within a `with` block, by hooks: the model itself needs none of it.

    What a thread runs is noted for that thread alone.
    """

    def __init__(self, model: LongcatForCausalLM, settings: Settings) -> None:
        """With settings whose balance loss is enabled, that loss is computed as well."""
        self._balance = settings if settings.device_balance.enabled else None
        self._routers, self._seen = routers(model), threading.local()

    def __enter__(self) -> Watch:
        self._hooks = [router.register_forward_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, router: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        loss = None
        if self._balance is not None and torch.is_grad_enabled():
            with torch.autocast(inputs[0].device.type, enabled=False):
                scores = F.linear(inputs[0].float(), router.classifier.weight.float()).softmax(dim=-1)
            loss = device_balance_loss(
                scores,
                routing.ids,
                n_routed_experts=router.config.n_routed_experts,
                devices=self._balance.device_balance.devices,
                target=self._balance.zero_experts.target,
            )
        rows = expert_rows(routing.ids, router.config.n_routed_experts)
        self._routed().append(Routed(rows, loss))

    def take(self) -> list[Routed]:
        """What was noted in this thread since the last call, in the order of the layers."""
        routed = list(self._routed())
        self._routed().clear()
        return routed

    def _routed(self) -> list[Routed]:
        if not hasattr(self._seen, "routed"):
            self._seen.routed = []
        routed: list[Routed] = self._seen.routed
        return routed


def device_balance_loss(scores: Tensor, ids: Tensor, *, n_routed_experts: int, devices: int, target: float) -> Tensor:
    """`sum_j f_j P_j` over the groups of FFN experts that share a device, and one group of all zero experts.

    scores: fp32 [T, N + Z], the router's softmax; ids: [T, K] as in `Routing`; target: K_e, the FFN experts wanted a
    token. P_j is the mean score of group j as a whole. f_j is `D / (K_e T)` times the choices of group j, and for
    the zero experts `1 / ((K - K_e) T)` times theirs: each is 1 where devices are loaded alike and the target holds,
    and so is the loss, for the P_j sum to 1. The gradient is that of the P_j.

    Source: report, section 2.1.1, of which the coefficient is left to the caller.
    """
    tokens, top_k = ids.shape
    rows = expert_rows(ids, n_routed_experts)
    per_device = rows.view(devices, -1).sum(dim=1) * (devices / (target * tokens))
    mean = scores.mean(dim=0)
    loss = (per_device * mean[:n_routed_experts].view(devices, -1).sum(dim=1)).sum()
    if scores.shape[1] > n_routed_experts:
        zero_slots = (tokens * top_k - rows.sum()) / ((top_k - target) * tokens)
        loss = loss + zero_slots * mean[n_routed_experts:].sum()
    return loss


class BiasController(nn.Module):
    """Sets `e_score_correction_bias` of every layer after each step, from what the layer's router did in it.

    The bias of FFN expert i is `(offset + balance_i) / (N + Z)`; that of a zero expert stays 0, as in the report
    (section 2.1.1): what FFN experts win, zero experts lose. `offset` is the output of a PID controller for the mean
    of FFN experts a token. `balance_i` goes up by what expert i lacks to the mean load of the FFN experts, as a share
    of it, and down by what it has too much; its own mean is kept at 0, so that the two do not work against each other.
    Together they are the report's `mu (K_e / (K N) - T_i / (K T))`, whose sum over i is the controller's error.
    """

    integral: Tensor
    """fp64 [layers]."""
    last_error: Tensor
    """fp64 [layers]: of the mean FFN experts, as a share of the top k."""
    balance: Tensor
    """fp64 [layers, N]."""

    def __init__(self, settings: Settings, layers: int) -> None:
        super().__init__()
        self._settings = settings
        experts = settings.model.n_routed_experts
        # On the CPU, in fp64: a few numbers, which no device has to wait for.
        self.register_buffer("integral", torch.zeros(layers, dtype=torch.float64))
        self.register_buffer("last_error", torch.zeros(layers, dtype=torch.float64))
        self.register_buffer("balance", torch.zeros(layers, experts, dtype=torch.float64))

    def update(self, rows: Tensor, tokens: int, rate: float) -> Tensor:
        """One step of control.

        rows: [layers, N], tokens of each FFN expert, of `tokens`; rate: the share of the gains that is left, 0 to 1.
        Returns the new biases, fp32 [layers, N + Z].
        """
        settings, model = self._settings, self._settings.model
        rows, width = rows.double().cpu(), model.n_routed_experts + model.zero_expert_num
        offset = torch.zeros_like(self.integral)
        if settings.zero_experts.controlled:
            gains = settings.zero_experts
            error = (gains.target - rows.sum(dim=1) / tokens) / model.moe_topk
            # A bias of 1 is more than any score: further the sum need not go. The rate is in the sum, so that when it
            # falls what was found stays, and one batch moves it less.
            self.integral = (self.integral + rate * gains.integral * error).clamp(-width, width)
            offset = self.integral + rate * (gains.proportional * error + gains.derivative * (error - self.last_error))
            self.last_error = error
        if settings.bias_balance.enabled:
            mean = rows.mean(dim=1, keepdim=True)
            step = rate * settings.bias_balance.rate * (1 - rows / mean.clamp(min=1)).clamp(min=-1)
            self.balance = self.balance + step - step.mean(dim=1, keepdim=True)
        bias = torch.zeros(len(rows), width)
        bias[:, : model.n_routed_experts] = ((offset.unsqueeze(1) + self.balance) / width).float()
        return bias

    def begin_at(self, biases: Tensor) -> None:
        """Go on from the biases of a trained model, fp32 [layers, N + Z]."""
        ours = biases[:, : self.balance.shape[1]].double() * biases.shape[1]
        self.integral = ours.mean(dim=1)
        self.balance = ours - self.integral.unsqueeze(1)

    def grow(self) -> None:
        """Stack the layers upon themselves, as the model's."""
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, torch.cat((buffer, buffer)))


def set_biases(model: LongcatForCausalLM, biases: Tensor) -> None:
    """biases: fp32 [layers, N + Z]."""
    for router, bias in zip(routers(model), biases, strict=True):
        router.e_score_correction_bias.copy_(bias)
