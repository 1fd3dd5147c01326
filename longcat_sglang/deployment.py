"""What LongCat-Flash can be served with in SGLang: options are checked before any process of the engine starts."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import torch

from longcat_core import spellings
from longcat_core.observation import shared_target
from longcat_core.plugin.engine import leave_to_own_class, refuse, unserved_quantization
from longcat_core.plugin.gate import uses_gate
from longcat_core.plugin.hooks import Stage
from longcat_core.plugin.requested import refuse_what_the_own_class_lacks
from longcat_sglang import devices, dial, hooks, loading, options, placement, requested
from longcat_sglang.engine import OVERLAP, OWN_CLASS, drafts_with_mtp

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def settle(server_args: ServerArgs) -> None:
    """Check a LongCat's deployment, and set what SGLang would otherwise choose itself or ask of its own class.

    Raises:
        ValueError: as `check`.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

    hooks.install(Stage.DEPLOYMENT)
    settings, model_config = resolving_view(server_args), model_config_of(server_args)
    hf_config = model_config.hf_config
    shared_target.settle(requested.of(settings).ffn_experts is not None)
    if reasons := reasons_for_sglangs_own_class(settings, model_config):
        refuse_what_the_own_class_lacks("SGLang", reasons, requested.of(settings), requested.OPTIONS)
        leave_to_own_class("SGLang", reasons, _LOST, logger)
        # Every process of SGLang reads the configuration again, and these with it.
        overrides = {**json.loads(settings.json_model_override_args), OWN_CLASS: True}
        declare_resolution(server_args, "longcat-serving", json_model_override_args=json.dumps(overrides))
        setattr(hf_config, OWN_CLASS, True)
        return
    check(server_args, settings, model_config)
    for caution in devices.of(settings.device).cautions(server_args, settings, model_config):
        logger.warning("longcat-serving: %s", caution)
    if settings.enable_single_batch_overlap:
        _settle_overlap(server_args, settings)
    if (backend := devices.of(settings.device).attention_backend) is not None:
        declare_resolution(server_args, "longcat-serving", attention_backend=backend)
    if settings.moe_a2a_backend == "deepep" and settings.moe_runner_backend == "auto":
        # SGLang chooses DeepGEMM itself for experts in FP8, and for those in bf16 Triton, which fails (options.py).
        declare_resolution(server_args, "longcat-serving", moe_runner_backend="deep_gemm")
    drafts_some = settings.speculative_num_steps is not None
    if drafts_with_mtp(settings) and drafts_some and settings.speculative_eagle_topk is None:
        # SGLang compares it with 1 even if it is None (arg_groups/speculative_hook.py).
        declare_resolution(server_args, "longcat-serving", speculative_eagle_topk=1)


def _settle_overlap(server_args: ServerArgs, settings: Any) -> None:
    """Ask our layers for it, and SGLang no more: its own overlap of other models does not run on Hopper, and each
    process that is asked for it ends there (layers/moe/utils.py, `initialize_moe_config`)."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    device = devices.of(settings.device)
    if obstacles := device.obstacles_to_overlap(settings):
        logger.warning("longcat-serving: no layer's MoE runs beside its dense path: %s", "; ".join(obstacles))
        return
    logger.info("longcat-serving: beside the dense path of a layer: %s", device.what_overlaps(settings))
    overrides = json.dumps({**json.loads(settings.json_model_override_args), OVERLAP: True})
    declared = {"enable_single_batch_overlap": False, "json_model_override_args": overrides}
    declare_resolution(server_args, "longcat-serving", **declared)


def check(server_args: Any, settings: Any, model_config: Any) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint.

    server_args: what the user gave; settings: what SGLang made of it so far.
    """
    hf_config = model_config.hf_config
    refuse(_unsupported(server_args, settings, model_config))
    directory = loading.local_directory(settings)
    loading.check(directory, settings, hf_config.longcat)
    of_gate = directory if drafts_with_mtp(settings) else None
    asked, gate_option = requested.of(settings), requested.OPTIONS["draft_gate"]
    uses_gate(of_gate, asked.draft_gate, obstacles_to_gate(settings), gate_option, logger)
    if asked.ffn_experts is not None:
        hooks.install(Stage.DIAL)


def reasons_for_sglangs_own_class(settings: Any, model_config: Any) -> list[str]:
    """What our class cannot serve yet, and SGLang's own can, where it runs."""
    if not devices.of(settings.device).runs_own_class:
        return []
    reasons = devices.of(settings.device).reasons_for_own_class()
    reasons += options.reasons_for_own_class(settings, model_config.hf_config.longcat)
    return reasons + _unserved_quantization(settings, model_config, any_block=False)


_LOST = (
    "zero experts scaled by routed_scaling_factor (sglang#10019), without which its answers are not LongCat's; expert "
    "choices of zero experts without a GEMM row, the audit of the checkpoint, drafts from the MTP layer's own latent"
)
"""What LongCat-Flash does not have in SGLang's own class."""


def _quantization(settings: Any, model_config: Any) -> str | None:
    """As SGLang has read it, from --quantization, `config.json` or files beside it."""
    return settings.quantization or model_config.quantization


def _unserved_quantization(settings: Any, model_config: Any, any_block: bool) -> list[str]:
    # Not of `hf_config` itself, whose sizes SGLang pads for its kernels.
    published = spellings.published(model_config.hf_config.longcat)
    return unserved_quantization(_quantization(settings, model_config), published, any_block)


def _unsupported(server_args: Any, settings: Any, model_config: Any) -> list[str]:
    """Options that SGLang would accept for LongCat-Flash and then get wrong, each with what to do."""
    longcat, problems = model_config.hf_config.longcat, list[str]()
    problems += _unsupported_quantization(settings, model_config)
    device = devices.of(settings.device)
    problems += device.unsupported(server_args, settings)
    asked = requested.of(settings)
    if asked.kernels:
        obstacles = device.obstacles_to_kernels(settings, longcat, model_config.dtype)
        problems += [f"{requested.OPTIONS['kernels']}: {obstacle}; or leave the kernels out" for obstacle in obstacles]
    if asked.ffn_experts is not None:
        obstacles = dial.obstacles(settings, longcat, asked.ffn_experts)
        problems += [f"{requested.OPTIONS['ffn_experts']}: {obstacle}; or leave it out" for obstacle in obstacles]
    if settings.pp_size > 1:
        problems.append(
            f"pp_size: {settings.pp_size}, wanted 1, as SGLang's layer boundaries have no pipeline for LongCat; "
            "leave --pp-size out"
        )
    if longcat.num_attention_heads % settings.tp_size:
        problems.append(
            f"tp_size: {settings.tp_size}, wanted a divisor of the {longcat.num_attention_heads} heads; "
            "give --tp-size one"
        )
    problems += placement.problems(settings, longcat)
    problems += _unsupported_speculation(server_args, settings, _quantization(settings, model_config))
    return problems + options.refusals(settings, longcat, device.runs_own_class)


def _unsupported_quantization(settings: Any, model_config: Any) -> list[str]:
    instead = "give such a checkpoint, or one in bf16, and leave --quantization out"
    unserved = _unserved_quantization(settings, model_config, any_block=True)
    if unserved or _quantization(settings, model_config) is None:
        return [f"{problem}; {instead}" for problem in unserved]
    block, dtype, problems = model_config.hf_config.longcat.quantization.block, model_config.dtype, []
    if block[0] != block[1]:  # asserted in configs/update_config.py, for a CPU
        problems.append(
            f"quantization_config.weight_block_size: {list(block)}, wanted two equal numbers, as SGLang takes no "
            f"others; {instead}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        problems.append(
            f"dtype: {str(dtype).removeprefix('torch.')}, wanted bfloat16 or float16, as SGLang takes no other with "
            "FP8 weights; give --dtype one of them"
        )
    return problems


def _unsupported_speculation(server_args: Any, settings: Any, quantization: str | None) -> list[str]:
    problems: list[str] = []
    if not drafts_with_mtp(settings):
        return problems
    drafter = settings.speculative_draft_model_path
    if drafter not in (None, server_args.model_path, settings.model_path):
        problems.append(
            f"speculative_draft_model_path: {drafter!r}, wanted none: "
            "the MTP layer is in the model's own checkpoint; leave --speculative-draft-model-path out"
        )
    steps, branches = settings.speculative_num_steps, settings.speculative_eagle_topk
    nodes = settings.speculative_num_draft_tokens
    if steps is None and (branches, nodes) != (None, None) and not settings.speculative_adaptive:
        problems.append("speculative_num_steps: None, wanted a number for this tree; give --speculative-num-steps")
    if (branches or 1) > 1 and nodes is None:
        problems.append(
            f"speculative_num_draft_tokens: None, wanted the size of a tree of {branches} branches, its root included; "
            "give --speculative-num-draft-tokens, or leave --speculative-eagle-topk out"
        )
    problems += _impossible_tree(steps, branches, nodes)
    for option in ("speculative_token_map", "speculative_draft_model_quantization", "enable_multi_layer_eagle"):
        value = getattr(settings, option)
        if value and (option, value) != ("speculative_draft_model_quantization", quantization):  # which SGLang sets
            flag = option.replace("_", "-")
            problems.append(f"{option} is not supported for LongCat's MTP layer; leave --{flag} out")
    return problems


def _impossible_tree(steps: int | None, branches: int | None, nodes: int | None) -> list[str]:
    """Sizes that SGLang accepts, and over which its worker fails at the first request."""
    given = {"speculative_num_steps": steps, "speculative_eagle_topk": branches}
    problems = [
        f"{name}: {value}, wanted 1 or more; give --{name.replace('_', '-')} such a number"
        for name, value in given.items()
        if value is not None and value < 1
    ]
    if problems or steps is None or nodes is None or branches in (None, 1):
        return problems
    most = 1 + branches + (steps - 1) * branches**2
    if not steps < nodes <= most:
        problems.append(
            f"speculative_num_draft_tokens: {nodes}, wanted {steps + 1} to {most}, which a tree of {steps} steps and "
            f"{branches} branches can have, its root included; give --speculative-num-draft-tokens such a number"
        )
    return problems


def obstacles_to_gate(settings: Any) -> list[str]:
    """Options with which the number of drafts is fixed before a gate can judge them, or drafts are not its own."""
    if not drafts_with_mtp(settings):
        return ["there are no drafts of the MTP layer; give --speculative-algorithm NEXTN"]
    obstacles = devices.of(settings.device).obstacles_to_gate()
    if (settings.speculative_eagle_topk or 1) > 1:
        obstacles.append(f"speculative_eagle_topk is {settings.speculative_eagle_topk}, wanted 1, as it judges chains")
    # Ranks with other requests would verify another number of drafts than the one that SGLang makes room for on all.
    obstacles += [
        f"{option} is set; leave --{option.replace('_', '-')} out"
        for option in ("speculative_adaptive", "speculative_use_rejection_sampling", "enable_dp_attention")
        if getattr(settings, option)
    ]
    return obstacles
