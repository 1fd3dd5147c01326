"""The ground truth: transformers' LongCat-Flash, fed with published tensors, and how results are compared with it."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from longcat_core import spellings
from longcat_core.config import LongcatConfig

CLEAR_MARGIN = 1e-3
"""Greedy tokens must be equal wherever the two best logits of the truth differ by more than this."""

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Greedy(NamedTuple):
    """One token of a greedy continuation."""

    token: int
    margin: float
    """By how much its logit exceeds the second best."""


def oracle(
    config: LongcatConfig, published: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> LongcatFlashForCausalLM:
    """transformers' model with the published tensors; the router stays fp32, as transformers keeps it.

    Raises:
        ValueError: if the configuration turns an MLA scale off; transformers always has both.
    """
    if not (config.mla_scale_q_lora and config.mla_scale_kv_lora):
        raise ValueError("oracle: transformers always applies both MLA scales; a config without one has no oracle")
    model = LongcatFlashForCausalLM(
        LongcatFlashConfig.from_dict(spellings.for_transformers(spellings.published(config)))
    ).eval()
    state = _transformers_state(config, published)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    # Not model.to(dtype), which would round buffers as well: the rotary frequencies and the correction bias.
    for name, parameter in model.named_parameters():
        if not name.endswith("classifier.weight"):
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


@torch.no_grad()
def oracle_logits(model: LongcatFlashForCausalLM, ids: Tensor) -> Tensor:
    """fp32 logits [B, T, vocabulary] of int64 tokens [B, T]."""
    return model(ids, use_cache=False).logits.float()


@torch.no_grad()
def greedy(model: LongcatFlashForCausalLM, prompt: Sequence[int], max_new_tokens: int) -> list[Greedy]:
    """The greedy continuation of a prompt, computed anew for each token: no cache that could be wrong."""
    ids, continuation = list(prompt), []
    for _ in range(max_new_tokens):
        best = oracle_logits(model, torch.tensor([ids]))[0, -1].topk(2)
        continuation.append(Greedy(int(best.indices[0]), float(best.values[0] - best.values[1])))
        ids.append(continuation[-1].token)
    return continuation


def assert_greedy_equal(ours: Sequence[int], truth: Sequence[Greedy]) -> int:
    """Tokens are equal up to the first unclear choice, after which continuations may part. Returns how many."""
    assert len(ours) == len(truth), f"{len(ours)} tokens, wanted {len(truth)}"
    for position, (token, wanted) in enumerate(zip(ours, truth, strict=True)):
        if wanted.margin <= CLEAR_MARGIN:
            return position
        assert token == wanted.token, f"token {position} is {token}, wanted {wanted.token} by {wanted.margin:.4f}"
    return len(truth)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest true value: the one measure of difference in all tests."""
    assert value.shape == truth.shape, f"{list(value.shape)}, wanted {list(truth.shape)}"
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def typical_error(value: Tensor, truth: Tensor) -> float:
    """The median over tokens of `relative_error`, of logits [..., vocabulary].

    For comparisons in bf16, where a rounding turns the choice of expert of a few tokens, in any implementation.
    """
    pairs = zip(value.flatten(0, -2), truth.flatten(0, -2), strict=True)
    return statistics.median(relative_error(ours, theirs) for ours, theirs in pairs)


def _transformers_state(config: LongcatConfig, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked. transformers has `gate_up_proj` rows for zero experts too, which must never be read."""
    inner, hidden = config.expert_ffn_hidden_size, config.hidden_size
    state: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name.startswith("model.mtp."):
            continue
        match = _EXPERT.fullmatch(name)
        if match is None:
            state[name] = tensor
            continue
        experts, index, part = match.groups()
        if f"{experts}.down_proj" not in state:
            state[f"{experts}.down_proj"] = torch.empty(config.n_routed_experts, hidden, inner)
            garbage = (
                torch.randn(config.num_experts, 2 * inner, hidden, generator=torch.Generator().manual_seed(0)) * 1e3
            )
            state[f"{experts}.gate_up_proj"] = garbage
        if part == "down":
            state[f"{experts}.down_proj"][int(index)] = tensor
        else:
            rows = slice(0, inner) if part == "gate" else slice(inner, None)
            state[f"{experts}.gate_up_proj"][int(index), rows] = tensor
    return state
