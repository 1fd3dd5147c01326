"""Floors of decode steps and prompts, worked out by hand for a tiny model and for the benchmark's large one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.bench_floor import CONFIGS, Name
from benchmarks.floors import Floor, Routed, decode_floor, measured_machine, prefill_floor, with_product_rate
from longcat_core import spellings
from longcat_core.planning.calibration import Sizes
from longcat_core.planning.hardware import gpu
from longcat_core.planning.models import Model, of_config
from longcat_core.planning.rates import Rates, rates

# Sizes that differ, so that a wrong one shows.
TINY = replace(
    CONFIGS[Name.large],
    vocab_size=1000,
    hidden_size=10,
    num_layers=3,
    num_attention_heads=2,
    q_lora_rank=7,
    kv_lora_rank=6,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=3,
    ffn_hidden_size=20,
    expert_ffn_hidden_size=8,
    n_routed_experts=16,
    zero_expert_num=8,
    moe_topk=6,
)
ATTENTION = 10 * (7 + 6 + 4) + 7 * 2 * (5 + 4) + 2 * 6 * (5 + 3) + 2 * 3 * 10
DENSE_FFN, EXPERT, ROUTER, HEAD = 3 * 10 * 20, 3 * 10 * 8, 10 * (16 + 8), 1000 * 10


def model(config: object = TINY) -> Model:
    return of_config(spellings.published(config), "tiny")  # type: ignore[arg-type]


def machine(bytes_per_second: float, operations_per_second: float) -> Rates:
    with_bandwidth = replace(rates(gpu("H100")), memory_bytes_per_second=bytes_per_second)
    return with_product_rate(with_bandwidth, operations_per_second)


def test_a_decode_step_reads_every_dense_weight_the_chosen_experts_the_cache_and_the_head_once() -> None:
    floor = decode_floor(model(), machine(1e3, 1e30), 2, 50, Routed(experts=6, choices=4))
    weights = 2 * (2 * ATTENTION + 2 * DENSE_FFN + 6 * EXPERT) + 4 * ROUTER
    cache = 2 * 2 * 50 * 2 * (6 + 4)  # attentions, requests, tokens, bytes of a latent and a rotary key
    assert floor.memory_bytes == 3 * (weights + cache) + 2 * HEAD
    assert floor.seconds == pytest.approx(floor.memory_bytes / 1e3)
    assert floor.bound == "bytes"


def test_a_decode_step_multiplies_each_token_with_what_it_activates_and_its_queries_with_the_cache() -> None:
    floor = decode_floor(model(), machine(1e30, 1e3), 2, 50, Routed(experts=6, choices=4))
    products = 2 * (2 * ATTENTION + 2 * DENSE_FFN + 4 * EXPERT + ROUTER)
    attended = 2 * 50 * 2 * 2 * ((6 + 4) + 6)  # attentions, tokens; two operations and heads; scores and values
    assert floor.operations == 2 * (3 * (products + attended) + 2 * HEAD)
    assert floor.seconds == pytest.approx(floor.operations / 1e3)
    assert floor.bound == "operations"


def test_an_operation_takes_as_long_as_its_slower_resource() -> None:
    """At 25 GB/s and 166 GFLOPS the weights of one request are bound by bytes, and attention to 32k tokens is not."""
    large, rate = model(CONFIGS[Name.large]), machine(25e9, 166e9)
    floor = decode_floor(large, rate, 1, 32768, Routed(experts=8, choices=8))
    only_bytes = decode_floor(large, machine(25e9, 1e30), 1, 32768, Routed(experts=8, choices=8))
    only_operations = decode_floor(large, machine(1e30, 166e9), 1, 32768, Routed(experts=8, choices=8))
    attended = 12 * 32768 * 2 * 16 * (576 + 512) / 166e9
    assert floor.seconds > max(only_bytes.seconds, only_operations.seconds)
    without_cache = decode_floor(large, machine(25e9, 1e30), 1, 0, Routed(experts=8, choices=8))
    assert floor.seconds == pytest.approx(without_cache.seconds + attended)
    assert floor.bound == "operations"


def test_the_large_model_has_622_m_parameters_and_decodes_56_tokens_a_second_at_25_gb_a_second() -> None:
    """217 M of them, activated, in bf16 would be 57; the router in fp32 and a cache of 128 tokens come on top."""
    config = CONFIGS[Name.large]
    assert round(config.total_parameters / 1e6) == 622
    assert round(config.activated_parameters(8) / 1e6) == 217
    floor = decode_floor(model(config), machine(25e9, 166e9), 1, 128, Routed(experts=8, choices=8))
    assert 1 / floor.seconds == pytest.approx(56.3, abs=0.05)


def test_a_prompt_multiplies_every_token_sees_those_before_it_and_has_one_token_chosen() -> None:
    tokens = 30
    floor = prefill_floor(model(), machine(1e30, 1e3), tokens)
    products = 2 * (2 * ATTENTION + 2 * DENSE_FFN + 4 * EXPERT + ROUTER)  # 4 of 6 choices are FFN experts
    pairs = tokens * (tokens + 1) // 2
    attended = 2 * pairs * 2 * 2 * ((5 + 4) + 3)  # attentions; two operations and heads; keys and values
    assert floor.operations == 3 * (tokens * products + attended) + 2 * HEAD
    assert floor.seconds == pytest.approx(floor.operations / 1e3)


def test_more_of_anything_takes_longer() -> None:
    def seconds(requests: int = 2, context: int = 50, experts: float = 7, choices: float = 4) -> float:
        return decode_floor(model(), machine(1e3, 1e4), requests, context, Routed(experts, choices)).seconds

    assert (
        min(seconds(requests=20), seconds(context=90), seconds(experts=8), seconds(experts=0, choices=400)) > seconds()
    )
    floors: list[Floor] = [prefill_floor(model(), machine(1e3, 1e4), tokens) for tokens in (1, 2, 100, 101)]
    assert [each.seconds for each in floors] == sorted(each.seconds for each in floors)


def test_the_machine_is_measured_and_products_run_at_the_highest_rate() -> None:
    tiny = Sizes(bytes_read=1 << 16, weights=(2, 16, 32), rows=(1, 4), operators=5, passes=2, seconds=0.01)
    found = measured_machine(tiny)
    products = [value for name, value in found.figures.items() if name.startswith("product_")]
    assert len(products) == 3
    assert found.rates.products("bf16", 1) == pytest.approx(max(products) * 1e9)
    assert found.rates.attention_per_second == found.rates.products("bf16", 512)
    assert found.rates.memory_bytes_per_second == pytest.approx(found.figures["memory_gb_per_s"] * 1e9)
