"""What LongCat-Flash can be served with in vLLM: options are checked before any process of the engine starts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import LongcatFlashConfig

from longcat_core import spellings
from longcat_core.observation import shared_target
from longcat_core.plugin.engine import leave_to_own_class, refuse, unserved_quantization
from longcat_core.plugin.gate import uses_gate
from longcat_core.plugin.hooks import Stage
from longcat_core.plugin.requested import refuse_what_the_own_class_lacks
from longcat_vllm import adapters, devices, dial, hooks, loading, placement, requested
from longcat_vllm.engine import (
    OWN_ARCHITECTURE,
    TRANSPORT_WITH_TOO_FEW_COLUMNS,
    mtp_speculation,
    shares_experts_over_a_transport,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")
"""Below vLLM's logger, whose handlers it uses."""


def check(vllm_config: VllmConfig) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint."""
    model = vllm_config.model_config
    asked = requested.of(vllm_config)
    shared_target.settle(asked.ffn_experts is not None)
    if reasons := devices.current().reasons_for_own_class(vllm_config):
        refuse_what_the_own_class_lacks("vLLM", reasons, asked, requested.OPTIONS)
        leave_to_own_class("vLLM", reasons, _LOST, logger)
        model.hf_config.architectures = [OWN_ARCHITECTURE]
        return
    hooks.install(Stage.DEPLOYMENT)
    config = spellings.read(model.hf_config)
    refuse(_unsupported(vllm_config))
    placement.settle(vllm_config, config)
    adapters.restrict(vllm_config.lora_config)
    loading.check(vllm_config, config)
    _tell_of_overrides_that_nothing_reads(model)
    _settle_overlap(vllm_config)
    if asked.ffn_experts is not None:
        hooks.install(Stage.DIAL)
        dial.add_to_workers(vllm_config)
    if (speculation := mtp_speculation(vllm_config)) is not None:
        _give_drafts_the_targets_context(speculation, model)
    obstacles, directory = obstacles_to_gate(vllm_config), Path(model.model) if speculation is not None else None
    gate_option = requested.OPTIONS["draft_gate"]
    if uses_gate(directory, asked.draft_gate, obstacles, gate_option, logger) and speculation is not None:
        _schedule_after_the_gate(vllm_config, speculation)
    if asked.follows_queue:
        from longcat_vllm import scheduling

        scheduling.say_what_waits(vllm_config)


def _tell_of_overrides_that_nothing_reads(model: ModelConfig) -> None:
    given = {} if callable(model.hf_overrides) else model.hf_overrides
    known = vars(LongcatFlashConfig()).keys() - {"head_dim", "qk_head_dim", "num_key_value_heads"}  # which follow
    unread = sorted(name for name in given if not spellings.is_read(name) and name not in known)
    if unread:
        logger.warning("hf_overrides: LongCat-Flash reads no field %s; check the spelling", " or ".join(unread))


def _settle_overlap(vllm_config: VllmConfig) -> None:
    device, asked = devices.current(), requested.of(vllm_config).overlap
    obstacles = device.obstacles_to_overlap(vllm_config)
    if asked is False:
        obstacles = ["it is turned off"]
    elif asked is None and not device.overlaps_unasked:
        obstacles = obstacles or [f"it is not asked for; give {requested.OPTIONS['overlap']}"]
    if obstacles:
        logger.info("LongCat: the experts of a layer do not run beside its dense path: %s", "; ".join(obstacles))
        return
    logger.info("LongCat: %s", device.what_overlaps)
    device.prepare_overlap(vllm_config)


def _give_drafts_the_targets_context(speculation: SpeculativeConfig, target: ModelConfig) -> None:
    """vLLM reads `config.json` again for the MTP layer, without --hf-overrides that are a dictionary."""
    if speculation.max_model_len is None:
        speculation.draft_model_config.max_model_len = target.max_model_len


_LOST = (
    "expert choices of zero experts without a GEMM row, the audit of the checkpoint, the MTP layer's own embedding, "
    "norms inside MLA with transformers' epsilon, YaRN's attention_factor and truncate, `ignored_layers` that name "
    "q_a_proj or kv_a_proj_with_mqa"
)
"""What LongCat-Flash does not have in vLLM's own class."""


def _schedule_after_the_gate(vllm_config: VllmConfig, speculation: SpeculativeConfig) -> None:
    """Schedule a step after its drafts are judged, and count pruned drafts."""
    from longcat_vllm import metrics
    from longcat_vllm.speculation import GATE_SCHEDULER

    scheduler = vllm_config.scheduler_config
    scheduler.async_scheduling = False
    scheduler.scheduler_cls = GATE_SCHEDULER
    speculation.disable_padded_drafter_batch = True
    metrics.collect()


def obstacles_to_gate(vllm_config: VllmConfig) -> list[str]:
    """Options with which the number of drafts is fixed before a gate can judge them, or drafts are not its own."""
    speculation, scheduler = mtp_speculation(vllm_config), vllm_config.scheduler_config
    if speculation is None:
        return ['there are no drafts of the MTP layer; give --speculative-config \'{"method": "mtp", ...}\'']
    obstacles = []
    if vllm_config.use_v2_model_runner:
        obstacles.append("this model runner drafts a fixed number of tokens; set VLLM_USE_V2_MODEL_RUNNER=0")
    if scheduler.async_scheduling:
        obstacles.append("async_scheduling schedules a step before its drafts are known; leave it out")
    if speculation.draft_sample_method != "greedy":
        obstacles.append(f"draft_sample_method is {speculation.draft_sample_method!r}, wanted 'greedy'; leave it out")
    if speculation.num_speculative_tokens_per_batch_size:
        obstacles.append("num_speculative_tokens_per_batch_size chooses the number of drafts; leave it out")
    if scheduler.scheduler_cls is not None:
        obstacles.append(f"scheduler_cls is {scheduler.scheduler_cls!r}, wanted none; leave it out")
    return obstacles


def _unsupported(vllm_config: VllmConfig) -> list[str]:
    """Options that vLLM would accept for LongCat-Flash and then get wrong, each with what to do."""
    model, speculation = vllm_config.model_config, mtp_speculation(vllm_config)
    problems = []
    if not model.use_mla:
        problems.append("it needs MLA, which VLLM_MLA_DISABLE turns off; unset that")
    problems += [
        f"{problem}; give such a checkpoint, or one in bf16, and leave --quantization out"
        for problem in unserved_quantization(model.quantization, model.hf_config, any_block=True)
    ]
    if speculation is not None:
        problems += _unsupported_speculation(speculation, model)
    parallel = vllm_config.parallel_config
    if speculation is not None and parallel.pipeline_parallel_size > 1 and not vllm_config.use_v2_model_runner:
        # Every rank but the last fails, as it has no drafter (`_check_and_update_cudagraph_mode` in 0.32).
        problems.append(
            f"pipeline_parallel_size: {parallel.pipeline_parallel_size}, wanted 1 with drafts, which this model runner "
            "makes on one stage only; leave --pipeline-parallel-size or --speculative-config out"
        )
    problems += adapters.unsupported(vllm_config.lora_config)
    problems += loading.unsupported(vllm_config)
    problems += devices.current().unsupported(vllm_config)
    asked, device = requested.of(vllm_config), devices.current()
    if asked.kernels:
        obstacles = device.obstacles_to_kernels(vllm_config)
        problems += [f"{requested.OPTIONS['kernels']}: {obstacle}; or leave the kernels out" for obstacle in obstacles]
    if asked.flashinfer_mla:
        obstacles = device.obstacles_to_flashinfer_mla(vllm_config)
        problems += [f"{requested.OPTIONS['flashinfer_mla']}: {obstacle}; or leave it out" for obstacle in obstacles]
    if asked.overlap:
        obstacles = device.obstacles_to_overlap(vllm_config)
        problems += [f"{requested.OPTIONS['overlap']}: {obstacle}; or leave it out" for obstacle in obstacles]
    if asked.ffn_experts is not None:
        obstacles = dial.obstacles(vllm_config, asked.ffn_experts)
        problems += [f"{requested.OPTIONS['ffn_experts']}: {obstacle}; or leave it out" for obstacle in obstacles]
    problems += _unsupported_parallelism(parallel)
    problems += _unsupported_experts(vllm_config)
    return problems


def _unsupported_speculation(speculation: SpeculativeConfig, model: ModelConfig) -> list[str]:
    """Entries of --speculative-config that vLLM would ignore for the MTP layer, or fail over."""
    problems = []
    if speculation.model not in (model.model, model.model_weights):
        problems.append(
            f"speculative_config.model: {speculation.model!r}, wanted none: the MTP layer is part of {model.model!r}; "
            "leave the model out of --speculative-config"
        )
    for option in ("quantization", "kv_cache_dtype", "use_local_argmax_reduction"):
        value = getattr(speculation, option)
        if value and (option, value) != ("quantization", model.quantization):  # which vLLM has set itself
            problems.append(
                f"speculative_config.{option}: {value!r}, wanted none, as the MTP layer is served as the model is; "
                f"leave {option} out of --speculative-config"
            )
    return problems


def _unsupported_parallelism(parallel: ParallelConfig) -> list[str]:
    problems = []
    if shares_experts_over_a_transport(parallel) and parallel.all2all_backend == TRANSPORT_WITH_TOO_FEW_COLUMNS:
        problems.append(
            f"all2all_backend: {TRANSPORT_WITH_TOO_FEW_COLUMNS!r}, wanted allgather_reducescatter or "
            "deepep_high_throughput, as it has room for 11 experts a token where LongCat has 12; leave "
            "--all2all-backend out"
        )
    return problems


def _unsupported_experts(vllm_config: VllmConfig) -> list[str]:
    problems = []
    if vllm_config.aux_output_config.enable_return_routed_experts:
        problems.append(
            "enable_return_routed_experts: vLLM returns experts as unsigned numbers, in which a zero expert (-1) "
            "would be expert 255 or 65535; leave --enable-return-routed-experts out"
        )
    return problems
