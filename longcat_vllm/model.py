"""LongCat-Flash for vLLM: the decoder layer with its shortcut-connected MoE, and loading of published checkpoints."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from longcat_core import spellings
from longcat_core.config import LongcatConfig
from longcat_core.layers import rotary
from longcat_core.plugin.hooks import Stage
from longcat_core.weights import audit, checkpoint, names
from longcat_core.weights.audit import CheckpointError
from longcat_core.weights.blocks import FP8
from longcat_core.weights.plan import Layout, Target, load_plan
from longcat_core.weights.precision import dequantized, is_kept, require_precision
from longcat_vllm import devices, dial, hooks, loading, metrics, placement, quantization, requested, updates
from longcat_vllm.adapters import AdapterNames
from longcat_vllm.attention import LongcatAttention
from longcat_vllm.ffn import LongcatFFN
from longcat_vllm.moe import LongcatMoE, MovableExperts, ZeroExpertAwareExperts

logger = logging.getLogger(f"vllm.{__name__}")
LAYOUT = Layout(fused_qkv_a="fused_qkv_a_proj", experts="experts.routed_experts")
PACKED = {"gate_up_proj": ["gate_proj", "up_proj"], LAYOUT.fused_qkv_a: ["q_a_proj", "kv_a_proj_with_mqa"]}
"""The published projections that one of vLLM's linear layers holds, the first one's rows first."""


class LongcatDecoderLayer(nn.Module):
    """Two attentions, two dense FFNs, and one MoE that reads after the first attention and is added at the end."""

    def __init__(
        self, config: LongcatConfig, vllm_config: VllmConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = nn.ModuleList(
            LongcatAttention(config, vllm_config, quant_config, f"{prefix}.self_attn.{i}") for i in range(2)
        )
        self.mlps = nn.ModuleList(
            LongcatFFN(hidden, config.ffn_hidden_size, quant_config, f"{prefix}.mlps.{i}") for i in range(2)
        )
        self.input_layernorm = nn.ModuleList(RMSNorm(hidden, eps=eps) for _ in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, eps=eps) for _ in range(2))
        self.mlp = LongcatMoE(config, vllm_config.parallel_config, quant_config, f"{prefix}.mlp")

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        choices: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm[0](hidden_states)
        else:
            hidden_states, residual = self.input_layernorm[0](hidden_states, residual)
        attended = self.self_attn[0](hidden_states, cos, sin)
        hidden_states, residual = self.post_attention_layernorm[0](attended, residual)
        attention: Any = self.self_attn[1]
        ffn: Any = self.mlps[1]
        experts = self.mlp.begin(hidden_states, choices)
        hidden_states, residual = self.input_layernorm[1](self.mlps[0](hidden_states), residual)
        query, latent, k_rope = attention.project(hidden_states, cos, sin)
        experts = self.mlp.compute(experts, between=query)
        hidden_states, residual = self.post_attention_layernorm[1](attention.attend(query, latent, k_rope), residual)
        dense = ffn.partial(hidden_states)
        shortcut = self.mlp.end(experts, between=dense)
        return ffn.summed(dense, shortcut.partial), residual + shortcut.whole


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class LongcatModel(nn.Module):
    kernels: Any = None
    """A device's own layers, once it has asked."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = spellings.read(vllm_config.model_config.hf_config)
        stage, quant_config = get_pp_group(), quantization.of_model(vllm_config, config, PACKED)
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens"))
            if stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank)
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_layers,
            lambda prefix: LongcatDecoderLayer(config, vllm_config, quant_config, prefix),
            prefix=maybe_prefix(prefix, "layers"),
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if stage.is_last_rank else PPMissingLayer()
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", rotary.inverse_frequencies(config), persistent=False)
        self.attention_factor = rotary.attention_factor(config.rope)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        self.is_counted = metrics.are_counted_here(vllm_config)
        self.notes_choices = self.is_counted or requested.of(vllm_config).ffn_experts is not None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor | IntermediateTensors, Tensor | None]:
        """Also returns the ids of the routings, int32 [layers, T, K], if they are counted or held at a mean; that is
        done outside, as only there it is known in every mode of CUDA graphs which rows are tokens."""
        residual = None
        choices: list[Tensor] | None = [] if self.notes_choices else None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            assert input_ids is not None
            hidden_states = self.embed_input_ids(input_ids)
        cos, sin = rotary.cos_sin(positions.unsqueeze(-1), self.inverse_frequencies, self.attention_factor)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, cos, sin, choices)
        noted = None if choices is None else torch.stack(choices)
        if not get_pp_group().is_last_rank:
            assert residual is not None, "a stage has at least one layer"
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual}), noted
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states, noted


class LongcatCausalLM(nn.Module):
    """What the target and its drafter share: logits, and loading of published tensors."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED
    _audited = staticmethod(audit.audited)
    model: Any
    expert_weights: Any = ()
    """Of experts that move between ranks."""

    def __init__(self, vllm_config: VllmConfig, config: LongcatConfig, plan: Mapping[str, Target]) -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config  # as vLLM's pooling models want it
        self.longcat = config
        self._plan = plan
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self._vllm_config = vllm_config
        self.update = updates.Update(plan)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load published tensors; the names of the parameters that were written.

        Raises:
            CheckpointError: listing every tensor that is extra or misshapen, and in the first load, as in a reload from
                a checkpoint, every missing one; other loads update a running model and may be partial. After an error
                within vLLM's `reload_weights`, or within an update by its engines of weight transfer, each layer has
                all of its new weights or those that it had; which have the new ones is in the message.
        """
        self.model.kernels = None  # of weights that may lie elsewhere now
        is_update = updates.is_begun(self)
        self.update.follow(self)
        # With LoRA, vLLM puts a module around each one that adapters change.
        parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in self.named_parameters()}
        loaded: set[str] = set()
        is_whole = updates.is_checkpoint(weights) if is_update else not self._is_loaded()
        try:
            if len(self.expert_weights):
                raise CheckpointError(
                    "weights cannot be loaded again where experts move between ranks; restart the server with the new "
                    "ones"
                )
            if is_update and hasattr(self.config, placement.FIELD):
                raise CheckpointError(
                    "weights cannot be reloaded where a file places experts; restart the server with the new ones"
                )
            if is_update and is_whole and (directory := loading.directory(self._vllm_config)) is not None:
                checkpoint.verify(directory, self.longcat)
            # With vLLM's filter, the experts of other ranks are left out.
            is_partial = not is_whole or self._vllm_config.parallel_config.enable_ep_weight_filter
            audited = self._audited(weights, self.longcat, is_partial=is_partial)
            kept = partial(is_kept, self._plan, parameters)
            waiting = self.update.waiting if is_update else None
            packed = self._packed(parameters) if not is_update and self._is_loaded() else frozenset[str]()
            for name, tensor in dequantized(audited, self.longcat, kept, logger, waiting):
                if is_update:
                    self.update.add(name)
                loaded |= self._load(parameters, packed, name, tensor)
        except Exception as error:  # of a file that cannot be read, too
            if is_update:
                if is_whole:
                    self.update.restore_source(self._vllm_config.model_config)
                updates.abandon(self, self.update, self._vllm_config.model_config, error)
            raise
        if is_whole:
            self.update.note_source(self._vllm_config.model_config)
        return loaded

    def _is_loaded(self) -> bool:
        """Judged by tensors derived from the weights, as some of vLLM's loaders call no method of this class."""
        return any(isinstance(module, MLAAttention) and hasattr(module, "W_UV") for module in self.modules())

    def _packed(self, parameters: Mapping[str, Tensor]) -> frozenset[str]:
        """Names of those that a loaded model may have in another form than published: vLLM arranges FP8 weights and
        their scales anew for some kernels on a GPU, and a CPU's for all."""
        packs = devices.current().has_packed
        experts = tuple(
            f"{name}.".replace(".base_layer.", ".")
            for name, module in self.named_modules()
            if isinstance(module, ZeroExpertAwareExperts) and packs(module)
        )
        return frozenset(
            name
            for name, parameter in parameters.items()
            if parameter.dtype == FP8 or name.endswith(names.SCALE_SUFFIX) or name.startswith(experts)
        )

    def _load(self, parameters: dict[str, Any], packed: Container[str], name: str, tensor: Tensor) -> set[str]:
        """Load one tensor, or leave it to another stage, another rank or the other of the two models."""
        target = self._plan.get(name)
        if target is None or is_pp_missing_parameter(target.parameter, self):
            return set()
        parameter: Any = parameters.get(target.parameter)
        require_precision(name, tensor, parameter)
        loader: Callable[..., Any] = getattr(parameter, "weight_loader", default_weight_loader)
        if target.parameter in packed:
            raise CheckpointError(
                f"{name}: the weights of experts, and those in FP8, are packed for this device's kernels, and cannot "
                "be written in place; update them with vLLM's reload_weights"
            )
        if target.expert is not None:
            part = {"shard_id": target.shard, "expert_id": target.expert}
            is_local = loader(parameter, tensor, target.parameter, **part, return_success=True)
            return {target.parameter} if is_local else set()
        if target.part is not None:
            loader(parameter, tensor, target.part)
        else:
            loader(parameter, target.folded(tensor))
        return {target.parameter}


class LongcatFlashForCausalLM(LongcatCausalLM, MovableExperts, SupportsLoRA, SupportsPP):
    lora_skip_prefixes: ClassVar[list[str]] = [names.MTP_PREFIX]
    """Adapters do not change drafts; an adapted model verifies them as it would any others."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = spellings.read(vllm_config.model_config.hf_config)
        super().__init__(vllm_config, config, load_plan(config, LAYOUT))
        hooks.install(Stage.MODEL)
        self.hf_to_vllm_mapper = AdapterNames(config=config)
        self.model = LongcatModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: ParallelLMHead | PPMissingLayer
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                assert not isinstance(self.model.embed_tokens, PPMissingLayer), "the last stage has it, to tie it to"
                head = head.tie_weights(self.model.embed_tokens)
            self.lm_head = head
        else:
            self.lm_head = PPMissingLayer()
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        devices.current().choose_kernels(self)
        self.counted: metrics.CountedChoices | None = None
        numbers = range(self.model.start_layer, self.model.end_layer)
        layers = [self.model.layers[n] for n in numbers]
        self.offer([layer.mlp for layer in layers])
        self.dialled = dial.of_layers(vllm_config, config, layers)
        if self.model.is_counted:
            self.counted = metrics.CountedChoices(vllm_config, config, numbers, self.dialled)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if self.dialled is not None:
            self.dialled.begin_step()
        decoded = devices.current().decode(self.model, input_ids, positions, inputs_embeds)
        output, choices = decoded or self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        if self.dialled is not None and choices is not None:
            self.dialled.end_step(choices, metrics.rows_that_are_tokens())
        if self.counted is not None and choices is not None:
            self.counted.add(choices, rows=len(positions))
        return output
