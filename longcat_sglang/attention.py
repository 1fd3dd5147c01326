"""The MLA backend for CPUs: SGLang's paged cache and batches around `longcat_core.latent_attention`.

On CUDA SGLang's own MLA backends (FlashAttention 3, FlashMLA, FlashInfer, Triton) are used and nothing here is loaded.
Without `sgl_kernel` SGLang has none for a CPU.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from torch import Tensor

from longcat_core.latent_attention import PagedBatch, paged_attention


class LatentAttentionBackend(AttentionBackend):
    """Any latent size and head count. SGLang's table names slots, so a block is one slot."""

    forward_metadata: PagedBatch | None

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self._slots_of = runner.req_to_token_pool
        self._cache = runner.token_to_kv_pool

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
            return
        seq_lens = forward_batch.seq_lens.tolist()
        new = [1] * len(seq_lens) if mode.is_decode() else forward_batch.extend_seq_lens.tolist()
        self.forward_metadata = PagedBatch.build(
            query_starts=[0, *accumulate(new)],
            seq_lens=seq_lens,
            block_table=self._slots_of.req_to_token[forward_batch.req_pool_indices],
            block_size=1,
        )

    def support_triton(self) -> bool:
        return False

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        w_uk: Tensor,
        w_uv: Tensor,
        **_: Any,
    ) -> Tensor:
        """q: [T, heads, nope + rope]; k: [T, 1, latent + rope]; v: its first `latent` columns. Returns [T, heads v]."""
        assert self.forward_metadata is not None
        if save_kv_cache:
            self._cache.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        cache = self._cache.get_key_buffer(layer.layer_id).squeeze(1)
        attended = paged_attention(q, cache, self.forward_metadata, w_uk, w_uv, layer.scaling)
        return attended.flatten(1)

    forward_decode = forward_extend
