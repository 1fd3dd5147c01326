"""The MTP layer for SGLang: the draft model behind `--speculative-algorithm NEXTN`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn, make_stages
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_model, get_stream
from sglang.srt.utils import BumpAllocator, add_prefix
from torch import Tensor, nn

from longcat_core.layers import rotary
from longcat_core.weights import audit, checkpoint
from longcat_core.weights.plan import mtp_load_plan
from longcat_sglang import devices, loading, quantization
from longcat_sglang.attention import LongcatAttention
from longcat_sglang.config import LongcatFlashConfig
from longcat_sglang.ffn import LongcatFFN
from longcat_sglang.model import LAYOUT, PACKED, ZEROS_OF_AN_ATTENTION, LongcatCausalLM


class LongcatMTPLayer(nn.Module):
    """One dense layer on `eh_proj([enorm(embedding of the next token), hnorm(hidden)])`; modules as published.

    Replaces SGLang's LongcatFlashDenseDecoderLayer (models/longcat_flash_nextn.py), which leaves out
    `qkv_latent_func`, so that it attends with the latent of the target's last attention.
    """

    def __init__(self, hf_config: LongcatFlashConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        config = hf_config.longcat
        fp8_config = quantization.of_model(
            quant_config, config, PACKED, drafter=(prefix, loading.mtp_weights_in_fp8(get_model()))
        )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.ModuleDict({"m": RMSNorm(hidden, eps=eps)})
        self.hnorm = nn.ModuleDict({"m": RMSNorm(hidden, eps=eps)})
        self.eh_proj = ReplicatedLinear(
            2 * hidden, hidden, bias=False, quant_config=fp8_config, prefix=add_prefix("eh_proj", prefix)
        )
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.self_attn = LongcatAttention(
            hf_config,
            0,
            fp8_config,
            add_prefix("self_attn", prefix),
            get_stream("alt"),
            devices.current().rotary_embedding(config),
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        ffn = LongcatFFN(hidden, config.ffn_hidden_size, fp8_config, add_prefix("transformer_layer.mlp", prefix))
        self.transformer_layer = nn.ModuleDict({"mlp": ffn})
        self._attention, self._ffn = make_stages(
            (declare_attn(), self.input_layernorm, {"qkv_latent_func": self.self_attn.prepare_qkv_latent}),
            (declare_ffn(), self.post_attention_layernorm),
            terminal=True,
        )

    def forward(self, embedded: Tensor, forward_batch: ForwardBatch, attention_inputs: dict[str, Any]) -> Tensor:
        hidden_states = embedded
        if embedded.shape[0]:  # an idle rank has no hidden states either
            draft: Any = forward_batch.spec_info  # its class depends on the stage of drafting
            joined = (self.enorm["m"](embedded), self.hnorm["m"](draft.hidden_states))
            hidden_states, _ = self.eh_proj(torch.cat(joined, dim=-1))
        hidden_states = self._attention.prepare(hidden_states, forward_batch)
        if hidden_states.shape[0]:
            hidden_states = self.self_attn(hidden_states=hidden_states, **attention_inputs)
        hidden_states = self._attention.finish(hidden_states, forward_batch)
        hidden_states = self._ffn.prepare(hidden_states, forward_batch)
        with self._ffn.exit(forward_batch) as ffn:
            hidden_states = self.transformer_layer["mlp"](hidden_states)
        return ffn.finish(hidden_states)


class LongcatMTPModel(nn.Module):
    compiled: Any = None
    """A device's own, once it has asked."""

    def __init__(self, hf_config: LongcatFlashConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config = hf_config.longcat
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, use_attn_tp_group=is_dp_attention_enabled()
        )
        self.layers = nn.ModuleList([LongcatMTPLayer(hf_config, quant_config, add_prefix("layers.0", prefix))])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", rotary.inverse_frequencies(config), persistent=False)
        self.attention_factor = rotary.attention_factor(config.rope)

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        angles = devices.current().angles(self, positions)
        drafted = devices.current().draft(self, embedded, forward_batch, angles)
        if drafted is not None:
            return drafted
        attention_inputs = {
            "positions": positions,
            "forward_batch": forward_batch,
            "angles": angles,
            "zero_allocator": BumpAllocator(ZEROS_OF_AN_ATTENTION, dtype=torch.float32, device=embedded.device),
        }
        residual_batch.start(forward_batch)
        with get_global_expert_distribution_recorder().disable_this_region():
            hidden_states = self.layers[0](embedded, forward_batch, attention_inputs)
        return residual_batch.norm(hidden_states, forward_batch, self.norm, skip_empty=True)


class LongcatFlashMTP(LongcatCausalLM):
    """Drafts one token after another: what it returns as hidden states is what it takes in its next step.

    Its head is the target's, which SGLang's worker hands over.
    """

    _audited = staticmethod(audit.audited_mtp)
    is_drafter = True

    def __init__(
        self, config: LongcatFlashConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, mtp_load_plan(config.longcat, LAYOUT))
        self.model = LongcatMTPModel(config, quant_config, add_prefix("model", prefix))
        devices.current().choose_kernels(self)
        self.lm_head: nn.Module | None = None

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As the target's; from a disk also the auxiliary file, which SGLang leaves out if the index does."""
        if self.checkpoint is not None:
            directory = self.checkpoint.directory
        else:
            directory = None if self._is_loaded() else loading.directory(get_model())
        if directory is not None:
            weights = chain(weights, checkpoint.unnamed_tensors(directory))
        super().load_weights(weights)

    def set_embed_and_head(self, embed: Tensor, head: Tensor) -> None:
        """Ignore both: the MTP layer has its own embedding, and gets the head by `set_lm_head_from_target`."""

    def set_lm_head_from_target(self, target_lm_head: nn.Module) -> None:
        self.lm_head = target_lm_head

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        """input_ids: [T], the tokens after those at `positions` [T]; `forward_batch.spec_info.hidden_states`: [T, H],
        the target's normed ones there, or what this returned in the step before."""
        hidden_states = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)
