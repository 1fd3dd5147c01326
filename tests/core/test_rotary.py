"""Rotary embedding against that of transformers, which writes the rotated pairs as halves."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import (
    LongcatFlashRotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)

from longcat_core import spellings
from longcat_core.config import ConfigError, LongcatConfig, RopeConfig
from longcat_core.layers import rotary
from tests.cases import DEFAULT
from tests.oracle import relative_error

YARN = RopeConfig(theta=1e7, factor=4.0, original_max_position_embeddings=4096)
YARN_SETTINGS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
ROPES = {
    "plain": RopeConfig(theta=1e7),
    "plain_small_theta": RopeConfig(theta=1e4),
    "yarn": YARN,
    "yarn_mscale_all_dim": replace(YARN, mscale=1.0, mscale_all_dim=0.7),
    "yarn_mscale_only": replace(YARN, mscale=0.7),
    "yarn_mscale_all_dim_only": replace(YARN, mscale_all_dim=0.7),
    "yarn_attention_factor": replace(YARN, attention_factor=1.3),
    "yarn_betas": replace(YARN, theta=1e4, beta_fast=16.0, beta_slow=2.0),
    "yarn_not_truncated": replace(YARN, theta=1e4, truncate=False),
    "yarn_short_original": replace(YARN, original_max_position_embeddings=16),
}


def config_of(rope: RopeConfig, dim: int) -> LongcatConfig:
    return replace(DEFAULT, rope=rope, qk_rope_head_dim=dim, max_position_embeddings=16384)


def theirs(config: LongcatConfig) -> LongcatFlashRotaryEmbedding:
    return LongcatFlashRotaryEmbedding(
        LongcatFlashConfig.from_dict(spellings.for_transformers(spellings.published(config)))
    )


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_frequencies_and_factor_are_those_of_transformers(rope: str, dim: int) -> None:
    config = config_of(ROPES[rope], dim)
    truth = theirs(config)
    torch.testing.assert_close(rotary.inverse_frequencies(config), truth.inv_freq, rtol=1e-6, atol=0)
    assert rotary.attention_factor(config.rope) == pytest.approx(truth.attention_scaling)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dim", [8, 64])
def test_scores_of_rotated_queries_and_keys_are_those_of_transformers(rope: str, dim: int) -> None:
    config = config_of(ROPES[rope], dim)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 20, dim, generator=generator)  # [B, heads, T, D]
    positions = torch.randint(16384, (1, 20), generator=generator)

    cos, sin = theirs(config)(q, positions)
    their_q, their_k = apply_rotary_pos_emb_interleave(q, k, cos, sin)
    cos, sin = rotary.cos_sin(positions, rotary.inverse_frequencies(config), rotary.attention_factor(config.rope))
    our_q, our_k = (rotary.rotate_interleaved(t, cos.unsqueeze(1), sin.unsqueeze(1)) for t in (q, k))

    assert relative_error(our_q @ our_k.mT, their_q @ their_k.mT) < 1e-5
    assert relative_error(torch.cat((our_q[..., 0::2], our_q[..., 1::2]), dim=-1), their_q) < 1e-5


def test_pairs_are_interleaved() -> None:
    angle = torch.tensor([0.3, 1.1])
    x = torch.tensor([1.0, 0.0, 0.0, 1.0])
    rotated = rotary.rotate_interleaved(x, angle.cos(), angle.sin())
    cos, sin = angle.cos().tolist(), angle.sin().tolist()
    assert rotated.tolist() == pytest.approx([cos[0], sin[0], -sin[1], cos[1]])


def test_scores_depend_on_the_distance_only() -> None:
    frequencies = rotary.inverse_frequencies(config_of(ROPES["plain_small_theta"], 8))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(query_position: int, key_position: int) -> float:
        positions = torch.tensor([query_position, key_position])
        cos, sin = rotary.cos_sin(positions, frequencies, 1.0)
        return float(rotary.rotate_interleaved(q, cos[0], sin[0]) @ rotary.rotate_interleaved(k, cos[1], sin[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)


def test_angles_stay_fp32_when_x_is_bf16() -> None:
    frequencies = rotary.inverse_frequencies(DEFAULT)
    cos, sin = rotary.cos_sin(torch.tensor([100_000]), frequencies, 1.0)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rotary.rotate_interleaved(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    exact = rotary.rotate_interleaved(x.float(), cos, sin)
    assert torch.equal(rotated, exact.bfloat16()), "rounded once, at the end"


def test_the_length_that_yarn_starts_from_is_read_beside_its_settings_as_transformers_does() -> None:
    name = "original_max_position_embeddings"
    raw = spellings.published(config_of(ROPES["plain"], 64)) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    raw[name] = 4096
    truth = LongcatFlashRotaryEmbedding(LongcatFlashConfig.from_dict({**raw, "head_dim": 64}))
    torch.testing.assert_close(rotary.inverse_frequencies(spellings.read(raw)), truth.inv_freq, rtol=1e-6, atol=0)
    rewritten = spellings.for_transformers(raw)
    assert spellings.read(rewritten).rope == YARN
    assert name not in rewritten.keys() | spellings.for_sglang(raw).keys(), "an override could not change it"
    overridden = spellings.overridden(rewritten, {name: 64})
    assert overridden == {"rope_parameters": {**rewritten["rope_parameters"], name: 64}}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"original_max_position_embeddings": 64}, "4096 contradicts 64 outside of rope_scaling; remove one"),
        ({"rope_scaling": {**YARN_SETTINGS, "truncate": 0}}, "truncate: 0, wanted true or false"),
        ({"rope_scaling": {**YARN_SETTINGS, "attention_factor": "1"}}, "attention_factor: '1', wanted a number above"),
    ],
    ids=str,
)
def test_a_setting_of_yarn_that_could_be_read_in_two_ways_is_refused(change: dict[str, object], wanted: str) -> None:
    raw = spellings.published(config_of(YARN, 64))
    assert spellings.read(raw).rope == YARN
    with pytest.raises(ConfigError, match=wanted):
        spellings.read(raw | change)
