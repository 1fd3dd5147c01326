"""SGLang's rotary embedding with the angles of `longcat_core.layers.rotary`, for its MLA backends on a GPU."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from torch import Tensor

from longcat_core.config import LongcatConfig
from longcat_core.layers import rotary


class LongcatRotaryEmbedding(RotaryEmbedding):
    """For every RoPE that core reads. Of YaRN's settings, SGLang's own class for DeepSeek ignores `attention_factor`
    and `truncate`, and reads a missing `mscale` as 1, and an `mscale` of 0 as no factor on cos and sin."""

    cos_sin_cache: Tensor

    def __init__(self, config: LongcatConfig) -> None:
        self._longcat = config
        super().__init__(
            head_size=config.qk_rope_head_dim,
            rotary_dim=config.qk_rope_head_dim,
            max_position_embeddings=config.max_position_embeddings,
            base=config.rope.theta,  # type: ignore[arg-type]  # any number
            is_neox_style=False,
            dtype=torch.float32,
        )

    def _compute_cos_sin_cache(self) -> Tensor:
        return self._rows(0, self.max_position_embeddings, torch.get_default_device())

    def _ensure_cos_sin_cache_length(self, needed_max_pos: int) -> None:
        """SGLang asks for more where a server's context, with drafts, is longer than the model's."""
        have = len(self.cos_sin_cache)
        if needed_max_pos >= have:
            more = self._rows(have, needed_max_pos + 1, self.cos_sin_cache.device)
            self.cos_sin_cache = torch.cat((self.cos_sin_cache, more))

    def _rows(self, first: int, last: int, device: torch.device) -> Tensor:
        """fp32 [last - first, rotary_dim]: of each position the cosines, then the sines."""
        frequencies = rotary.inverse_frequencies(self._longcat).to(device)
        factor = rotary.attention_factor(self._longcat.rope)
        return torch.cat(rotary.cos_sin(torch.arange(first, last, device=device), frequencies, factor), dim=-1)
