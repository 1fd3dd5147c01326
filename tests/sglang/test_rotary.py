"""What SGLang's MLA rotates with on a GPU, where core's own rotation is not in the way: the same angles."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from torch import Tensor

from longcat_core import spellings
from longcat_core.config import LongcatConfig, RopeConfig
from longcat_core.layers import rotary
from longcat_sglang.devices.cpu.device import Cpu
from longcat_sglang.devices.cuda.device import Cuda
from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding
from tests.cases import DEFAULT, every_spelling
from tests.core.test_rotary import ROPES, config_of

CONTEXT, DIM = 16384, 64
MORE_ROPES = {
    **ROPES,
    "yarn_factor_1_attention_factor": RopeConfig(
        theta=1e7, attention_factor=1.3, original_max_position_embeddings=4096
    ),
}


def angles(config: LongcatConfig, last: int) -> Tensor:
    """fp32 [last, DIM]: cosines, then sines, of core."""
    frequencies, factor = rotary.inverse_frequencies(config), rotary.attention_factor(config.rope)
    return torch.cat(rotary.cos_sin(torch.arange(last), frequencies, factor), dim=-1)


@pytest.mark.parametrize("rope", MORE_ROPES)
def test_the_table_is_cores_for_every_spelling(rope: str) -> None:
    config = config_of(MORE_ROPES[rope], DIM)
    for spelling, raw in every_spelling(config).items():
        ours = LongcatRotaryEmbedding(spellings.read(raw)).cos_sin_cache
        assert ours.dtype == torch.float32
        assert torch.equal(ours, angles(config, CONTEXT)), spelling


@pytest.mark.parametrize("rope", MORE_ROPES)
def test_queries_and_keys_are_rotated_as_core_does(rope: str) -> None:
    config = config_of(MORE_ROPES[rope], DIM)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(20, 3, DIM, generator=generator), torch.randn(20, 1, DIM, generator=generator)
    positions = torch.randint(CONTEXT, (20,), generator=generator)
    ours = LongcatRotaryEmbedding(config).forward_native(positions, query.clone(), key.clone())
    cos, sin = angles(config, CONTEXT)[positions].unsqueeze(1).chunk(2, dim=-1)
    for rotated, given in zip(ours, (query, key), strict=True):
        torch.testing.assert_close(rotated, rotary.rotate_interleaved(given, cos, sin))


def test_a_context_beyond_the_models_is_more_of_the_same() -> None:
    config = config_of(ROPES["yarn_attention_factor"], DIM)
    embedding = LongcatRotaryEmbedding(config)
    embedding._ensure_cos_sin_cache_length(CONTEXT + 9)
    assert torch.equal(embedding.cos_sin_cache, angles(config, CONTEXT + 10))


def test_a_gpu_has_one_table_and_a_cpu_none() -> None:
    assert Cpu().rotary_embedding(DEFAULT) is None
    embedding = Cuda().rotary_embedding(DEFAULT)
    assert not embedding.is_neox_style, "pairs are interleaved"


@pytest.mark.parametrize("rope", ["yarn_mscale_only", "yarn_attention_factor", "yarn_not_truncated"])
def test_sglangs_own_table_is_still_another(rope: str) -> None:
    """If this fails, SGLang's class for DeepSeek may have become right: see `rotary.LongcatRotaryEmbedding`."""
    config = replace(config_of(ROPES[rope], DIM), max_position_embeddings=CONTEXT)
    scaling = {**spellings.published(config)["rope_scaling"], "rope_type": "deepseek_yarn"}
    theirs = get_rope(DIM, DIM, CONTEXT, config.rope.theta, False, scaling, torch.float32).cos_sin_cache
    assert not torch.allclose(theirs[:CONTEXT].cpu(), angles(config, len(theirs))[:CONTEXT], atol=1e-2)
