"""The MTP layer for vLLM: the draft model behind `--speculative-config '{"method": "mtp", ...}'`."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.drafting import gate as drafting
from longcat_core.layers import rotary
from longcat_core.weights import audit, checkpoint
from longcat_core.weights.plan import mtp_load_plan
from longcat_vllm import devices, loading, quantization
from longcat_vllm.attention import LongcatAttention
from longcat_vllm.engine import is_longcat
from longcat_vllm.ffn import LongcatFFN
from longcat_vllm.model import LAYOUT, PACKED, LongcatCausalLM
from longcat_vllm.speculation import GATE_SCHEDULER, GatedDrafts


class LongcatMTPLayer(nn.Module):
    """One dense layer on `eh_proj([enorm(embedding of the next token), hnorm(hidden)])`; modules as published."""

    def __init__(self, config: LongcatConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = quantization.of_model(
            vllm_config, config, PACKED, drafter=(prefix, loading.mtp_weights_in_fp8(vllm_config))
        )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.ModuleDict({"m": RMSNorm(hidden, eps=eps)})
        self.hnorm = nn.ModuleDict({"m": RMSNorm(hidden, eps=eps)})
        self.eh_proj = ReplicatedLinear(
            2 * hidden, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.eh_proj"
        )
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.self_attn = LongcatAttention(config, vllm_config, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)
        ffn = LongcatFFN(hidden, config.ffn_hidden_size, quant_config, f"{prefix}.transformer_layer.mlp")
        self.transformer_layer = nn.ModuleDict({"mlp": ffn})

    def forward(self, embedded: Tensor, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """embedded, hidden_states: [T, H]. Returns the FFN's output and the residual it is to be added to."""
        joined = torch.cat((self.enorm["m"](embedded), self.hnorm["m"](hidden_states)), dim=-1)
        residual, _ = self.eh_proj(joined)
        attended = self.self_attn(self.input_layernorm(residual), cos, sin)
        hidden_states, residual = self.post_attention_layernorm(attended, residual)
        return self.transformer_layer["mlp"](hidden_states), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0, "inputs_embeds": 0})
class LongcatMTPModel(nn.Module):
    kernels: Any = None
    """A device's own layer, once it has asked."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = spellings.read(vllm_config.model_config.hf_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        # vLLM numbers KV caches by the layer in the prefix: this one comes after the target's, two a decoder layer.
        layer = maybe_prefix(prefix, f"layers.{2 * config.num_layers}")
        self.layers = nn.ModuleList([LongcatMTPLayer(config, vllm_config, layer)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", rotary.inverse_frequencies(config), persistent=False)
        self.attention_factor = rotary.attention_factor(config.rope)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = rotary.cos_sin(positions.unsqueeze(-1), self.inverse_frequencies, self.attention_factor)
        hidden_states, residual = self.layers[0](embedded, hidden_states, cos, sin)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class LongcatFlashMTP(LongcatCausalLM):
    """Drafts one token after another: what it returns is the `hidden_states` of its next step.

    Its head is the target's, which vLLM's proposer puts into `lm_head`.
    """

    _audited = staticmethod(audit.audited_mtp)
    drafted_from: Tensor | None = None
    """[R, H], what the last drafts were chosen from: the `hidden_states` of the next step."""
    has_own_embed_tokens = True
    """With it vLLM shares the target's embedding only if it is equal; without it, always."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        if not is_longcat(vllm_config.model_config):  # Flash-Lite's drafter has the same architecture
            from vllm.model_executor.models.longcat_flash_mtp import LongCatFlashMTP

            return LongCatFlashMTP(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = spellings.read(vllm_config.model_config.hf_config)
        super().__init__(vllm_config, config, mtp_load_plan(config, LAYOUT))
        self.model = LongcatMTPModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        devices.current().choose_kernels(self, is_drafter=True)
        self._directory = loading.directory(vllm_config)
        self.gated_drafts: GatedDrafts | None = None
        if vllm_config.scheduler_config.scheduler_cls == GATE_SCHEDULER:
            gate = drafting.load(Path(vllm_config.model_config.model))
            assert gate is not None, "the scheduler is chosen where there is a gate"
            self.gated_drafts = GatedDrafts(gate.to(vllm_config.device_config.device))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the target's; the first load also reads the auxiliary file, which vLLM leaves out if the index does."""
        if self._directory is not None:
            weights = chain(weights, checkpoint.unnamed_tensors(self._directory))
            self._directory = None
        return super().load_weights(weights)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """input_ids: [T], the tokens after those at `positions` [T]; hidden_states: [T, H], the target's normed ones
        there, or what this returned in the step before."""
        return self.model(input_ids, positions, hidden_states, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        self.drafted_from = hidden_states
        logits = super().compute_logits(hidden_states)
        if self.gated_drafts is not None and logits is not None:
            self.gated_drafts.observe(logits)
        return logits
