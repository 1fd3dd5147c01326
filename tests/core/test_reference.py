"""The whole model in plain PyTorch against transformers: logits, greedy tokens, bf16, caches, the MTP layer."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashMLA,
    LongcatFlashMLP,
    LongcatFlashRMSNorm,
)

from longcat_core import reference, spellings
from longcat_core.layers.routing import Routing, route
from longcat_core.reference import LongcatForCausalLM
from tests.cases import CASES, DEFAULT, Case, in_dtype, published, write_checkpoint
from tests.oracle import assert_greedy_equal, greedy, oracle, oracle_logits, relative_error, typical_error

every_case = pytest.mark.parametrize("name", CASES)


def model_of(case: Case, dtype: torch.dtype = torch.float32) -> LongcatForCausalLM:
    model = LongcatForCausalLM(case.config).to(dtype).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.router.float()
    model.load_published(in_dtype(case.published(), dtype))
    return model


@functools.cache
def ours(name: str) -> LongcatForCausalLM:
    return model_of(CASES[name])


@functools.cache
def truth(name: str) -> LongcatFlashForCausalLM:
    return oracle(CASES[name].config, CASES[name].published())


def tokens(name: str, count: int = 3, length: int = 40, seed: int = 0) -> Tensor:
    return torch.tensor(CASES[name].prompts(count, length, seed))


def routings(name: str, ids: Tensor) -> list[tuple[Routing, Tensor]]:
    """What every router decided, and what it would have decided without its bias."""
    seen: list[tuple[Routing, Tensor]] = []

    def note(router: reference.Router, inputs: tuple[Tensor], routing: Routing) -> None:
        config = router.config
        unbiased = route(
            F.linear(inputs[0], router.classifier.weight),
            torch.zeros(config.num_experts),
            n_routed_experts=config.n_routed_experts,
            top_k=config.moe_topk,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        seen.append((routing, unbiased.ids))

    hooks = [layer.mlp.router.register_forward_hook(note) for layer in ours(name).model.layers]
    ours(name)(ids)
    for hook in hooks:
        hook.remove()
    return seen


# -- the cases are what their names say ----------------------------------------------------------------


@every_case
def test_a_case_chooses_ffn_and_zero_experts_and_its_bias_matters(name: str) -> None:
    config = CASES[name].config
    for routing, unbiased in routings(name, tokens(name)):
        assert (routing.ids >= 0).any()
        assert (routing.ids < 0).any() == (config.zero_expert_num > 0)
        moved = (routing.ids.sort().values != unbiased.sort().values).any(dim=1)
        assert moved.any()


def test_some_tokens_of_that_case_choose_zero_experts_only() -> None:
    for routing, _ in routings("all_slots_zero_experts", tokens("all_slots_zero_experts")):
        only_zero = (routing.ids < 0).all(dim=1)
        assert 0.3 < only_zero.float().mean() < 1.0


def test_topk_of_that_case_is_beyond_its_ffn_experts() -> None:
    config = CASES["topk_beyond_ffn_experts"].config
    assert config.moe_topk > config.n_routed_experts


@every_case
def test_a_case_decodes_to_clear_winners(name: str) -> None:
    continuations = [greedy(truth(name), prompt, 16) for prompt in tokens(name).tolist()]
    clear = [step.margin > 1e-2 for continuation in continuations for step in continuation]
    assert sum(clear) > 0.8 * len(clear)
    assert len({step.token for continuation in continuations for step in continuation}) > 8


# -- parity --------------------------------------------------------------------------------------------


@every_case
def test_logits_are_those_of_transformers(name: str) -> None:
    for seed in range(3):
        ids = tokens(name, seed=seed)
        assert relative_error(ours(name)(ids)[0], oracle_logits(truth(name), ids)) < 1e-4


@every_case
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    compared = 0
    for prompt in tokens(name, count=4, length=24).tolist():
        compared += assert_greedy_equal(ours(name).generate(prompt, 16), greedy(truth(name), prompt, 16))
    assert compared >= 32


@every_case
def test_the_bf16_error_is_at_most_twice_that_of_transformers(name: str) -> None:
    case, ids = CASES[name], tokens(name, count=4)
    weights = in_dtype(case.published(), torch.bfloat16)
    exact = oracle_logits(oracle(case.config, {key: value.float() for key, value in weights.items()}), ids)
    their_error = typical_error(oracle_logits(oracle(case.config, weights, torch.bfloat16), ids), exact)
    our_logits = model_of(case, torch.bfloat16)(ids)[0]
    assert our_logits.dtype == torch.bfloat16
    assert 0 < typical_error(our_logits, exact) <= 2 * their_error


@pytest.mark.parametrize("scale", ["mla_scale_q_lora", "mla_scale_kv_lora"])
def test_an_mla_scale_turned_off_is_that_factor_less(scale: str) -> None:
    """transformers cannot turn a scale off, but a norm weight divided by the factor does the same."""
    config, weights = DEFAULT, published(DEFAULT)
    off = LongcatForCausalLM(replace(config, **{scale: False}))
    off.load_published(weights)
    norm, factor = ("q_a", config.q_scale) if scale == "mla_scale_q_lora" else ("kv_a", config.kv_scale)
    assert factor > 1.1
    unscaled = {key: value / factor if f"{norm}_layernorm" in key else value for key, value in weights.items()}
    ids = tokens("default")
    with torch.no_grad():
        assert relative_error(off(ids)[0], oracle_logits(oracle(config, unscaled), ids)) < 1e-4
    with pytest.raises(ValueError, match="transformers always applies both MLA scales"):
        oracle(off.config, weights)


# -- the cache -----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("chunks", [[40], [39, 1], [1] * 40, [7, 1, 1, 20, 4, 7]])
def test_a_prompt_in_chunks_is_the_whole_prompt(name: str, chunks: list[int]) -> None:
    ids = tokens(name)
    whole_logits, whole_hidden, whole_cache = ours(name)(ids)
    logits, hidden, cache = [], [], None
    for chunk in ids.split(chunks, dim=1):
        chunk_logits, chunk_hidden, cache = ours(name)(chunk, cache)
        logits.append(chunk_logits)
        hidden.append(chunk_hidden)
    assert cache is not None
    assert relative_error(torch.cat(logits, dim=1), whole_logits) < 1e-5
    assert relative_error(torch.cat(hidden, dim=1), whole_hidden) < 1e-5
    assert len(cache) == 2 * CASES[name].config.num_layers
    assert all(relative_error(part, whole) < 1e-5 for part, whole in zip(cache, whole_cache, strict=True))


def test_the_cache_holds_one_latent_a_token_and_attention() -> None:
    config = CASES["odd_counts"].config
    _, _, cache = ours("odd_counts")(tokens("odd_counts"))
    assert [tuple(latents.shape) for latents in cache] == [(3, 40, config.latent_dim)] * 4
    assert sum(latents[0, 0].nbytes for latents in cache) == config.kv_cache_bytes_per_token(itemsize=4)


def test_a_batch_is_each_prompt_alone() -> None:
    ids = tokens("default")
    together = ours("default")(ids)[0]
    for row, logits in zip(ids, together, strict=True):
        assert relative_error(ours("default")(row[None])[0][0], logits) < 1e-5


# -- checkpoints ---------------------------------------------------------------------------------------


@every_case
def test_a_saved_model_is_loaded_unchanged(name: str, tmp_path: Path) -> None:
    model, ids = ours(name), tokens(name)
    write_checkpoint(tmp_path, model.config, model.published())
    again = LongcatForCausalLM.from_checkpoint(tmp_path)
    assert again.config == model.config
    assert {key: value.tolist() for key, value in again.published().items()} == {
        key: value.tolist() for key, value in CASES[name].published().items()
    }
    assert torch.equal(again(ids)[0], model(ids)[0])


@every_case
def test_a_config_that_transformers_saved_loads_the_same_model(name: str, tmp_path: Path) -> None:
    config = CASES[name].config
    write_checkpoint(tmp_path, config, CASES[name].published())
    LongcatFlashConfig.from_dict(spellings.for_transformers(spellings.published(config))).save_pretrained(tmp_path)
    model, ids = LongcatForCausalLM.from_checkpoint(tmp_path), tokens(name)
    assert model.config == config
    assert relative_error(model(ids)[0], oracle_logits(truth(name), ids)) < 1e-4


def test_a_bf16_checkpoint_keeps_its_router_in_fp32(tmp_path: Path) -> None:
    weights = in_dtype(published(DEFAULT), torch.bfloat16)
    model = LongcatForCausalLM.from_checkpoint(write_checkpoint(tmp_path, DEFAULT, weights), torch.bfloat16)
    router = model.model.layers[0].mlp.router
    assert router.classifier.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.classifier.weight, weights["model.layers.0.mlp.router.classifier.weight"])
    assert model.lm_head.weight.dtype == model.model.layers[0].mlp.experts.w13.dtype == torch.bfloat16


def test_a_tied_head_is_the_embedding() -> None:
    model = ours("tied_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ours("default").lm_head.weight is not ours("default").model.embed_tokens.weight


# -- the MTP layer -------------------------------------------------------------------------------------


def transformers_draft(name: str, hidden: Tensor, next_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The MTP layer out of transformers' own modules, for it has none: facts as published tensor names tell."""
    main, config = truth(name), truth(name).config
    weights = CASES[name].published()
    layer = "model.mtp.layers.0"

    def norm(x: Tensor, key: str) -> Tensor:
        module = LongcatFlashRMSNorm(config.hidden_size, config.rms_norm_eps)
        module.load_state_dict({"weight": weights[f"{key}.weight"]})
        return module(x)

    def loaded(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        module.load_state_dict({key: weights[f"{prefix}.{key}"] for key in module.state_dict()})
        return module

    embedded = F.embedding(next_tokens, weights["model.mtp.embed_tokens.weight"])
    x = torch.cat((norm(embedded, f"{layer}.enorm.m"), norm(hidden, f"{layer}.hnorm.m")), dim=-1)
    x = F.linear(x, weights[f"{layer}.eh_proj.weight"])
    attention = loaded(LongcatFlashMLA(config, layer_idx=0), f"{layer}.self_attn")
    angles = main.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    x = x + attention(norm(x, f"{layer}.input_layernorm"), angles, attention_mask=None)[0]
    ffn = loaded(LongcatFlashMLP(config), f"{layer}.transformer_layer.mlp")
    x = x + ffn(norm(x, f"{layer}.post_attention_layernorm"))
    x = norm(x, "model.mtp.norm")
    return main.lm_head(x), x


@every_case
@torch.no_grad()
def test_drafts_are_those_of_transformers_modules(name: str) -> None:
    ids = tokens(name)
    _, hidden, _ = ours(name)(ids)
    logits, draft_hidden, cache = ours(name).draft(hidden[:, :-1], ids[:, 1:])
    their_logits, their_hidden = transformers_draft(name, hidden[:, :-1], ids[:, 1:])
    assert relative_error(logits, their_logits) < 1e-4
    assert relative_error(draft_hidden, their_hidden) < 1e-4
    assert [tuple(latents.shape) for latents in cache] == [(3, 39, CASES[name].config.latent_dim)]


@every_case
def test_drafting_in_chunks_is_drafting_at_once(name: str) -> None:
    ids = tokens(name)
    _, hidden, _ = ours(name)(ids)
    whole_logits, whole_hidden, whole_cache = ours(name).draft(hidden, ids)
    logits, chained, cache = [], [], None
    for chunk, part in zip(ids.split([20, 1, 12, 7], dim=1), hidden.split([20, 1, 12, 7], dim=1), strict=True):
        chunk_logits, chunk_hidden, cache = ours(name).draft(part, chunk, cache)
        logits.append(chunk_logits)
        chained.append(chunk_hidden)
    assert cache is not None
    assert relative_error(torch.cat(logits, dim=1), whole_logits) < 1e-5
    assert relative_error(torch.cat(chained, dim=1), whole_hidden) < 1e-5
    assert relative_error(cache[0], whole_cache[0]) < 1e-5


def test_drafting_without_an_mtp_layer_is_an_error() -> None:
    model = LongcatForCausalLM(DEFAULT, with_mtp=False)
    assert not any(".mtp." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="with_mtp=True"):
        model.draft(torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.int64))


# -- training ------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient() -> None:
    model = model_of(CASES["default"]).requires_grad_(True)
    ids = tokens("default")
    logits, hidden, _ = model(ids)
    drafted, _, _ = model.draft(hidden[:, :-1], ids[:, 1:])
    losses = [F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())]
    losses += [F.cross_entropy(drafted[:, :-1].flatten(0, 1), ids[:, 2:].flatten())]
    sum(losses).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradients_are_those_of_transformers() -> None:
    model = model_of(CASES["default"]).requires_grad_(True)
    theirs = oracle(DEFAULT, published(DEFAULT)).requires_grad_(True)
    ids = tokens("default")
    for logits in (model(ids)[0], theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in theirs.named_parameters():
        our_name = name.replace("experts.gate_up_proj", "experts.w13").replace("experts.down_proj", "experts.w2")
        gradient = parameter.grad[: DEFAULT.n_routed_experts] if our_name.endswith("w13") else parameter.grad
        assert relative_error(gradients[our_name], gradient) < 1e-4, name


def test_the_reference_is_short_enough_to_read() -> None:
    assert len(Path(reference.__file__).read_text().splitlines()) < 350
