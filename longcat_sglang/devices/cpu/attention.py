"""The MLA backend for CPUs: SGLang's paged cache and batches around `longcat_core.layers.latent_attention`.

On CUDA SGLang's own MLA backends (FlashAttention 3, FlashMLA, FlashInfer, Triton) are used and nothing here is loaded.
Without `sgl_kernel` SGLang has none for a CPU.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_executor.model_runner import ModelRunner
from torch import Tensor

from longcat_core.kernels.cpu.attention import paged_attention, takes, write_latents
from longcat_core.kernels.cpu.mla import Mla
from longcat_core.kernels.cpu.rotary import rotate
from longcat_core.layers.latent_attention import PagedBatch, UpProjection
from longcat_core.plugin.kept import kept
from longcat_sglang.devices.cpu.linear import projection

if TYPE_CHECKING:
    from longcat_sglang.attention import LongcatAttention


class LatentAttentionBackend(AttentionBackend):
    """Any latent size and head count. SGLang's table names slots, so a block is one slot."""

    forward_metadata: PagedBatch | None
    tokens: int
    """Of this step's requests. With data-parallel attention rows may follow that pad this rank's to others'."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        assert runner.req_to_token_pool is not None, "SGLang makes the pools first"
        self._slots_of = runner.req_to_token_pool
        self._cache = runner.token_to_kv_pool

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
            return
        seq_lens, trees = forward_batch.seq_lens.tolist(), None
        if mode.is_target_verify():  # whose lengths do not count the drafts
            draft: Any = forward_batch.spec_info  # of EAGLE or of n-grams, which name these fields alike
            new = [draft.draft_token_num] * len(seq_lens)
            seq_lens = [length + draft.draft_token_num for length in seq_lens]
            if draft.tree_topk > 1:
                trees = _one_for_each(draft.custom_mask.view(-1, *[draft.draft_token_num] * 2), len(seq_lens))
        elif mode.is_decode():
            new = [1] * len(seq_lens)
        else:
            assert forward_batch.extend_seq_lens is not None
            new = forward_batch.extend_seq_lens.tolist()
        self.tokens = sum(new)
        self.forward_metadata = PagedBatch(
            query_starts=[0, *accumulate(new)],
            seq_lens=seq_lens,
            block_table=self._slots_of.req_to_token,
            block_size=1,
            trees=trees,
            table_rows=forward_batch.req_pool_indices.tolist(),
        )

    def support_triton(self) -> bool:
        return False

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """The length of a request that pads a step: of a decode step its token alone. It goes into slot 0, which SGLang
        has no other use for, and nobody reads what it attends to."""
        return 1

    def forward_extend(  # type: ignore[override]  # called by `attend` alone, with the weight
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        k_rope: Tensor,
        up: UpProjection,
        **_: Any,
    ) -> Tensor:
        """q: [T, heads, nope + rope]; k and v: [T, 1, latent], the same; k_rope: [T, 1, rope]. Returns [T, heads v]."""
        assert self.forward_metadata is not None
        cache = self.cache_of(layer)
        if save_kv_cache:
            write_latents(cache, k.squeeze(1), k_rope.squeeze(1), forward_batch.out_cache_loc[: self.tokens])
        attended = paged_attention(q, cache, self.forward_metadata, up, layer.scaling)
        return attended.flatten(1)

    def cache_of(self, layer: RadixAttention) -> Tensor:
        """[slots, latent + rope]"""
        cache: Tensor = self._cache.get_key_buffer(layer.layer_id).squeeze(1)
        return cache

    forward_decode = forward_extend  # type: ignore[assignment]


def _one_for_each(trees: Tensor, requests: int) -> Tensor:
    """SGLang pads a rank's requests to the number of other ranks', and not their trees: theirs are chains."""
    chain = torch.ones(trees.shape[1:], dtype=torch.bool).tril()
    return torch.cat((trees, chain.expand(requests - len(trees), *chain.shape)))


class DraftingBackend:
    """Attention of the drafter's steps after the first: `attn_backends[i]` is for step i.

    Replaces SGLang's backends of that kind, which speculative/draft_utils.py makes.
    """

    def __init__(self, runner: ModelRunner, branches: int, steps: int) -> None:
        assert runner.req_to_token_pool is not None, "SGLang makes the pools first"
        self._slots_of = runner.req_to_token_pool
        self._branches, self._steps = branches, steps
        self.attn_backends = [LatentAttentionBackend(runner) for _ in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Each branch has its own tokens after its request's, one more in each step."""
        table, rows = self._slots_of.req_to_token, None
        if self._branches == 1:
            rows = forward_batch.req_pool_indices.tolist()
        else:
            table = self._slots_of_branches(forward_batch)
        seq_lens = forward_batch.seq_lens.repeat_interleave(self._branches)
        for step, backend in enumerate(self.attn_backends):
            backend.tokens = len(seq_lens)
            backend.forward_metadata = PagedBatch(
                query_starts=range(len(seq_lens) + 1),
                seq_lens=(seq_lens + step + 1).tolist(),
                block_table=table,
                block_size=1,
                table_rows=rows,
            )

    def _slots_of_branches(self, forward_batch: ForwardBatch) -> Tensor:
        """Branch b of a request of n tokens has the slots from n + b steps on (kernels/ops/speculative/cache_locs.py,
        `generate_draft_decode_kv_indices`)."""
        seq_lens = forward_batch.seq_lens.repeat_interleave(self._branches)
        written = int(seq_lens.max()) + self._branches * self._steps
        table = self._slots_of.req_to_token[:, :written][forward_batch.req_pool_indices]
        table = table.repeat_interleave(self._branches, dim=0)
        first = torch.arange(self._branches).repeat(len(forward_batch.seq_lens)) * self._steps
        own = seq_lens.unsqueeze(1) + torch.arange(self._steps - 1)
        return table.scatter_(1, own, table.gather(1, own + first.unsqueeze(1)))


def attend(
    attention: LongcatAttention, hidden_states: Tensor, forward_batch: ForwardBatch, cos: Tensor, sin: Tensor
) -> Tensor:
    """The forward pass of MLA around `LatentAttentionBackend`: [T, H] -> [T, H], as `LongcatAttention.forward`."""
    backend = get_attn_backend()
    assert isinstance(backend, LatentAttentionBackend), "a CPU has no other"
    # SGLang plans no attention for a rank without requests, which may be given rows as the others are.
    tokens = 0 if forward_batch.forward_mode.is_idle() else backend.tokens
    if tokens == len(hidden_states):
        return _attend(attention, backend, hidden_states, forward_batch, cos, sin)
    output = hidden_states.new_zeros(hidden_states.shape)
    if tokens:
        output[:tokens] = _attend(attention, backend, hidden_states[:tokens], forward_batch, cos[:tokens], sin[:tokens])
    return output


def _attend(
    attention: LongcatAttention,
    backend: LatentAttentionBackend,
    hidden_states: Tensor,
    forward_batch: ForwardBatch,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    mla = compiled_mla(attention)
    if mla is not None and backend.forward_metadata is not None:
        cache, slots = backend.cache_of(attention.attn_mqa), forward_batch.out_cache_loc[: backend.tokens]
        attended = mla(hidden_states, cos, sin, cache, slots, backend.forward_metadata)
        if attended is not None:
            return attended
    qkv_a = attention.prepare_qkv_latent(hidden_states, forward_batch)
    q_a, latent, k_rope = qkv_a.split(
        [attention.q_lora_rank, attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1
    )
    query = attention.q_b_proj_forward(attention.q_a_layernorm(q_a))
    query, k_rope = rotate(query, k_rope.unsqueeze(1), cos, sin)
    latent = attention.kv_a_layernorm(latent)
    attended = attention.attn_mqa(query, latent, latent, forward_batch, k_rope=k_rope, up=_up(attention))
    output, _ = attention.o_proj(attended)
    return output


def _up(attention: LongcatAttention) -> UpProjection:
    kv_b_proj: Any = attention.kv_b_proj.weight
    return UpProjection(kv_b_proj, attention.w_kc, attention.w_vc.transpose(1, 2))


def compiled_mla(attention: LongcatAttention) -> Mla | None:
    """Its decode steps in one call, if core's kernels multiply in all of its layers."""
    return kept(attention, _compiled)


def _compiled(attention: LongcatAttention) -> Mla | None:
    layers = attention.fused_qkv_a_proj_with_mqa, attention.q_b_proj, attention.o_proj
    qkv_a, q_b, o = map(projection, layers)
    up, norms = _up(attention), (attention.q_a_layernorm.weight, attention.kv_a_layernorm.weight)
    if qkv_a is None or q_b is None or o is None or any(norm.dtype != torch.bfloat16 for norm in norms):
        return None
    if not takes(up):
        return None
    epsilon = attention.q_a_layernorm.variance_epsilon
    return Mla(qkv_a, *norms, q_b, up, o, epsilon, attention.scaling)
