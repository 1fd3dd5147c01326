"""LongCat-Flash for SGLang: the decoder layer with its shortcut-connected MoE, and loading of published checkpoints."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layer_boundary import declare_attn, declare_ffn, make_stages
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.utils import maybe_executor_submit, should_async_load
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel, get_stream
from sglang.srt.utils import BumpAllocator, add_prefix
from torch import Tensor, nn

from longcat_core.config import LongcatConfig
from longcat_core.dial import DialledRouters
from longcat_core.layers import rotary
from longcat_core.plugin.hooks import Stage
from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights import audit, names
from longcat_core.weights.plan import Layout, Target, load_plan
from longcat_core.weights.precision import dequantized, is_kept, require_precision
from longcat_sglang import devices, dial, hooks, metrics, placement, quantization
from longcat_sglang.attention import LongcatAttention
from longcat_sglang.config import LongcatFlashConfig
from longcat_sglang.devices.cuda.rotary import LongcatRotaryEmbedding
from longcat_sglang.ffn import LongcatFFN
from longcat_sglang.moe import LongcatMoE
from longcat_sglang.quantization import LongcatFp8Config
from longcat_sglang.updates import Checkpoint

logger = logging.getLogger(__name__)
LAYOUT = Layout(fused_qkv_a="fused_qkv_a_proj_with_mqa", experts="experts")
PACKED = {"gate_up_proj": ["gate_proj", "up_proj"], LAYOUT.fused_qkv_a: ["q_a_proj", "kv_a_proj_with_mqa"]}
"""The published projections that one of SGLang's linear layers holds, the first one's rows first."""
ZEROS_OF_AN_ATTENTION = 2
"""What SGLang's MLA takes of the model's allocator of zeros: one for each product with an absorbed weight in FP8."""
WORTH_A_THREAD = 2**18
"""Bytes from which a tensor is loaded by another thread; for a smaller one, handing it over takes longer."""


class LongcatDecoderLayer(nn.Module):
    """Two attentions, two dense FFNs, and one MoE that reads after the first attention and is added at the end.

    Residuals, norms and what moves between ranks are SGLang's layer boundaries, chained as in its own LongCat.
    """

    def __init__(
        self,
        hf_config: LongcatFlashConfig,
        layer_id: int,
        quant_config: LongcatFp8Config | None,
        prefix: str,
        alt_stream: torch.cuda.Stream | None,
        rotary_embedding: LongcatRotaryEmbedding | None,
    ) -> None:
        super().__init__()
        config = hf_config.longcat
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = nn.ModuleList(
            LongcatAttention(
                hf_config,
                2 * layer_id + i,
                quant_config,
                add_prefix(f"self_attn.{i}", prefix),
                alt_stream,
                rotary_embedding,
            )
            for i in range(2)
        )
        self.mlps = nn.ModuleList(
            LongcatFFN(hidden, config.ffn_hidden_size, quant_config, add_prefix(f"mlps.{i}", prefix)) for i in range(2)
        )
        self.input_layernorm = nn.ModuleList(RMSNorm(hidden, eps=eps) for _ in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, eps=eps) for _ in range(2))
        self.mlp = LongcatMoE(config, layer_id, quant_config, add_prefix("mlp", prefix))
        latents = [{"qkv_latent_func": attention.prepare_qkv_latent} for attention in self.self_attn]
        self._attention, self._moe = make_stages(
            (declare_attn(), self.input_layernorm[0], latents[0]),
            (declare_ffn(sparse=True, next_sparse=True), self.post_attention_layernorm[0]),
            previous=declare_ffn(sparse=True, next_sparse=True) if layer_id else None,
            terminal=layer_id == config.num_layers - 1,
        )
        self._first_ffn, self._second_attention, self._second_ffn = make_stages(
            (declare_ffn(), self.post_attention_layernorm[0]),
            (declare_attn(), self.input_layernorm[1], latents[1]),
            (declare_ffn(), self.post_attention_layernorm[1]),
            prepared_from=self._moe.declaration,
        )

    def forward(
        self,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        attention_inputs: dict[str, Any],
        choices: list[Tensor] | None = None,
    ) -> Tensor:
        hidden_states = self._attention.prepare(hidden_states, forward_batch)
        if hidden_states.shape[0]:
            hidden_states = self.self_attn[0](hidden_states=hidden_states, **attention_inputs)
        hidden_states = self._attention.finish(hidden_states, forward_batch)
        hidden_states = self._moe.prepare(hidden_states, forward_batch)
        begun = self.mlp.begin(hidden_states, choices)

        hidden_states = self._first_ffn.branch_input(self._moe, hidden_states, forward_batch)
        with self._first_ffn.exit(forward_batch) as ffn:
            hidden_states = self.mlps[0](hidden_states)
        hidden_states = ffn.finish(hidden_states)

        hidden_states = self._second_attention.prepare(hidden_states, forward_batch)
        second: Any = self.self_attn[1]
        attend = second.project(hidden_states=hidden_states, **attention_inputs) if hidden_states.shape[0] else None
        begun = self.mlp.compute(begun)
        if attend is not None:
            hidden_states = attend()
        hidden_states = self._second_attention.finish(hidden_states, forward_batch)
        hidden_states = self._second_ffn.prepare(hidden_states, forward_batch)
        second_ffn: Any = self.mlps[1]
        with self._second_ffn.exit(forward_batch) as ffn:
            dense = second_ffn.partial(hidden_states)
            shortcut = self.mlp.end(begun)
            hidden_states = second_ffn.summed(dense, shortcut.partial)
        hidden_states = ffn.finish(hidden_states)
        whole = self._moe.branch_output(shortcut.whole, forward_batch)
        if shortcut.partial is None:  # its rows may be others than the dense FFN's
            return self._moe.merge_branch(whole, hidden_states, self._second_ffn, forward_batch)
        stream = residual_batch.current(forward_batch)
        stream.residual = stream.residual + whole
        return hidden_states


class LongcatModel(nn.Module):
    counted: metrics.CountedChoices | None = None
    dialled: DialledRouters | None = None
    compiled: Any = None
    """A device's own layers, once it has asked."""

    def __init__(self, hf_config: LongcatFlashConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config = hf_config.longcat
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, use_attn_tp_group=is_dp_attention_enabled()
        )
        alt_stream, rotary_embedding = get_stream("alt"), devices.current().rotary_embedding(config)
        fp8_config = quantization.of_model(quant_config, config, PACKED)
        self.layers = nn.ModuleList(
            LongcatDecoderLayer(
                hf_config, n, fp8_config, add_prefix(f"layers.{n}", prefix), alt_stream, rotary_embedding
            )
            for n in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", rotary.inverse_frequencies(config), persistent=False)
        self.attention_factor = rotary.attention_factor(config.rope)
        self.dialled = dial.of_layers(config, self.layers)
        if metrics.are_counted_here():
            self.counted = metrics.CountedChoices(config, self.dialled)

    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None = None
    ) -> Tensor:
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        angles = devices.current().angles(self, positions)
        inputs = {"positions": positions, "forward_batch": forward_batch, "angles": angles}
        choices = self.begin_step()
        decoded = devices.current().decode(self, hidden_states, forward_batch, angles, choices)
        if decoded is None:
            decoded = self._by_layers(hidden_states, forward_batch, inputs, choices)
        if choices is not None:
            self.end_step(choices, metrics.slots_of(forward_batch))
        return decoded

    def begin_step(self) -> list[Tensor] | None:
        """Where the ids of each layer's routing are to be noted; None if nobody wants them."""
        if self.dialled is not None:
            self.dialled.begin_step()
        return None if self.counted is None and self.dialled is None else []

    def end_step(self, choices: list[Tensor], slots: Tensor) -> None:
        """choices: int32 [T, K] of each layer; slots: int64 [T], as of `metrics.slots_of`."""
        if self.dialled is not None:
            self.dialled.end_step(choices, metrics.rows_that_are_tokens(slots))
        if self.counted is not None:
            self.counted.add(choices, slots)

    def _by_layers(
        self, hidden_states: Tensor, forward_batch: ForwardBatch, inputs: dict[str, Any], choices: list[Tensor] | None
    ) -> Tensor:
        attentions = 2 * len(self.layers)
        zeros = BumpAllocator(ZEROS_OF_AN_ATTENTION * attentions, dtype=torch.float32, device=hidden_states.device)
        inputs = inputs | {"zero_allocator": zeros}
        residual_batch.start(forward_batch)
        for n, layer in enumerate(self.layers):
            with get_global_expert_distribution_recorder().with_current_layer(n):
                hidden_states = layer(hidden_states, forward_batch, inputs, choices)
        return residual_batch.norm(hidden_states, forward_batch, self.norm, skip_empty=True)


class LongcatCausalLM(nn.Module):
    """What the target and its drafter share: logits, and loading of published tensors."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED
    _audited = staticmethod(audit.audited)
    is_drafter: ClassVar[bool] = False
    checkpoint: Checkpoint | None = None
    """What an update from a disk reads, while it does."""

    def __init__(
        self, config: LongcatFlashConfig, quant_config: QuantizationConfig | None, plan: Mapping[str, Target]
    ) -> None:
        super().__init__()
        self.config = config
        self._plan = plan
        self.quant_config = quant_config
        self.logits_processor = LogitsProcessor(config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load published tensors.

        Raises:
            CheckpointError: listing every tensor that is extra or misshapen, and in the first load, as in an update
                from a disk, every missing one; other loads update a running model and may be partial.
        """
        longcat = self.config.longcat
        for module in self.modules():
            if isinstance(module, LongcatMoE):
                devices.current().restore_experts(module.experts)
        parameters, copies = dict(self.named_parameters()), list[Future[None]]()
        audited = self._audited(weights, longcat, is_partial=self._is_loaded() and self.checkpoint is None)
        tensors = dequantized(audited, longcat, partial(is_kept, self._plan, parameters), logger)
        with ThreadPoolExecutor() as executor:  # as SGLang's own models do
            for name, tensor in tensors:
                maybe_executor_submit(
                    executor=executor,
                    futures=copies,
                    use_async=tensor.nbytes >= WORTH_A_THREAD and should_async_load(tensor),
                    func=self._load,
                    func_args=(parameters, name, tensor),
                )
        for copy in copies:
            copy.result()
        self.post_load_weights()

    def post_load_weights(self) -> None:
        """Derive tensors from the weights; SGLang calls it where it fills the weights without `load_weights`."""
        module: Any
        for module in self.modules():
            if isinstance(module, LongcatAttention):
                module.process_weights_after_loading()
            if hasattr(module, "compiled"):  # of weights that may lie elsewhere now
                module.compiled = None

    def _is_loaded(self) -> bool:
        """Judged by tensors derived from the weights, as some of SGLang's loaders call no method of this class."""
        return any(isinstance(module, LongcatAttention) and module.w_kc is not None for module in self.modules())

    @property
    def _derived_weight_cache_error(self) -> str | None:
        """Why an update is refused: SGLang asks each module for it by this name, before the first tensor."""
        changed = quantization.laid_out_anew(self)
        if not changed:
            return None
        return (
            f"{len(changed)} FP8 weights, {changed[0]} the first, are laid out for SGLang's kernels, wanted all as "
            "published; restart the server with the new weights"
        )

    def _load(self, parameters: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Load one tensor, or leave it to another rank or the other of the two models; called by several threads."""
        target = self._plan.get(name)
        if target is None:
            return
        parameter: Any = parameters.get(target.parameter)
        require_precision(name, tensor, parameter)
        loader: Callable[..., Any] = getattr(parameter, "weight_loader", default_weight_loader)
        if target.expert is not None:
            loader(parameter, tensor, target.parameter, shard_id=target.shard, expert_id=target.expert)
        elif target.part is None:
            loader(parameter, target.folded(tensor))
        elif LAYOUT.fused_qkv_a in target.parameter:  # replicated, so its loader knows no parts
            rows = self.config.longcat.q_lora_rank
            if name.endswith(names.SCALE_SUFFIX):
                rows //= PUBLISHED_BLOCK[0]
            parameter.data[slice(rows, None) if target.part else slice(rows)].copy_(tensor)
        else:
            loader(parameter, tensor, target.part)


class LongcatFlashForCausalLM(LongcatCausalLM):
    def __init__(
        self, config: LongcatFlashConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        devices.current().prepare_process()
        hooks.install(Stage.MODEL)
        super().__init__(config, quant_config, load_plan(config.longcat, LAYOUT))
        self.model = LongcatModel(config, quant_config, add_prefix("model", prefix))
        longcat = config.longcat
        self.lm_head = (
            self.model.embed_tokens
            if longcat.tie_word_embeddings
            else ParallelLMHead(
                longcat.vocab_size,
                longcat.hidden_size,
                prefix=add_prefix("lm_head", prefix),
                use_attn_tp_group=get_parallel().enable_dp_lm_head,
            )
        )
        devices.current().choose_kernels(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        """This rank's part of both; SGLang offers them to the drafter."""
        embedding: Any = self.model.embed_tokens
        head: Any = self.lm_head
        return embedding.weight, head.weight

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[Tensor]]:
        """What SGLang moves between ranks with --enable-eplb."""
        return placement.weights_of(self.model.layers, devices.current())

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None = None
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    @classmethod
    def get_model_config_for_expert_location(cls, config: LongcatFlashConfig) -> ModelConfigForExpertLocation:
        longcat: LongcatConfig = config.longcat
        return ModelConfigForExpertLocation(num_layers=longcat.num_layers, num_logical_experts=longcat.n_routed_experts)
