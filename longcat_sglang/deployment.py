"""What LongCat-Flash can be served with in SGLang: options are checked before any process of the engine starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from longcat_core.config import LongcatConfig
from longcat_core.drafting import gate as drafting
from longcat_core.plugin.engine import refuse, unsupported_cpu_cache, unsupported_quantization, uses_gate
from longcat_core.weights import checkpoint
from longcat_sglang import options
from longcat_sglang.compat import require_supported
from longcat_sglang.engine import CPU_ATTENTION

logger = logging.getLogger(__name__)

MTP_ALGORITHMS = ("NEXTN", "EAGLE")
"""SGLang's names for drafting with a layer that takes the target's hidden states."""


def check(server_args: Any, settings: Any, hf_config: Any) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint.

    server_args: what the user gave; settings: what SGLang made of it so far.
    """
    require_supported()
    refuse(_unsupported(server_args, settings, hf_config))
    directory = local_directory(settings)
    _check_checkpoint(directory, settings, hf_config.longcat)
    if is_gate_asked_for(hf_config) or drafts_with_mtp(settings):
        gate = drafting.load(directory) if directory is not None else None
        threshold = None if gate is None else gate.threshold
        uses_gate(threshold, is_gate_asked_for(hf_config), obstacles_to_gate(settings), GATE_OPTION, logger)


def local_directory(settings: Any) -> Path | None:
    """Where the checkpoint is on this machine, if it is: its directory, or its snapshot in the cache of the Hub."""
    if Path(settings.model_path).is_dir():
        return Path(settings.model_path)
    try:
        return Path(
            snapshot_download(
                settings.model_path, revision=settings.revision, cache_dir=settings.download_dir, local_files_only=True
            )
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None


READS_PUBLISHED_TENSORS = ("auto", "safetensors", "fastsafetensors", "runai_streamer", "presharded")
"""Load formats whose safetensors have the published names. Others have files or names of their own."""


def _check_checkpoint(directory: Path | None, settings: Any, longcat: LongcatConfig) -> None:
    """Check what can be before it is loaded, and say in the log what is not."""
    unchecked = ""
    if settings.load_format not in READS_PUBLISHED_TENSORS:
        unchecked = f"--load-format {settings.load_format} does not read published safetensors"
    elif directory is None:
        unchecked = f"{settings.model_path} is not on this machine yet"
    elif not any(directory.glob("*.safetensors")) and (found := [*directory.glob("*.bin"), *directory.glob("*.pt")]):
        unchecked = f"{found[0].name} is not safetensors"
    if unchecked or directory is None:
        logger.info("The checkpoint is not checked before it is loaded: %s.", unchecked)
        return
    checkpoint.verify(directory, longcat, requires_mtp=drafts_with_mtp(settings))


def reasons_for_sglangs_own_class(settings: Any, hf_config: Any) -> list[str]:
    """What our class cannot serve yet, and SGLang's own can, which runs on GPUs only."""
    reasons, quantization = (
        options.reasons_for_own_class(settings, hf_config.longcat),
        _quantization(settings, hf_config),
    )
    if quantization is not None and settings.device != "cpu":
        reasons.append(f"quantization {quantization!r} is not there yet in longcat-serving")
    return reasons


LOST = (
    "zero experts scaled by routed_scaling_factor (sglang#10019), without which its answers are not LongCat's; expert "
    "choices of zero experts without a GEMM row, the audit of the checkpoint, drafts from the MTP layer's own latent"
)
"""What LongCat-Flash does not have in SGLang's own class."""


def _quantization(settings: Any, hf_config: Any) -> str | None:
    of_checkpoint = hf_config.longcat.is_quantized and hf_config.quantization_config.get("quant_method")
    return settings.quantization or of_checkpoint or None


def _unsupported(server_args: Any, settings: Any, hf_config: Any) -> list[str]:
    """Options that SGLang would accept for LongCat-Flash and then get wrong, each with what to do."""
    longcat, problems = hf_config.longcat, []
    quantization = _quantization(settings, hf_config)
    if quantization is not None:
        problems.append(unsupported_quantization(quantization))
    if settings.device == "cpu":
        wanted = (None, "auto", CPU_ATTENTION)
        for option in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
            given = getattr(server_args, option)
            if given not in wanted:
                problems.append(f"{option}: {given!r}, wanted our own on a CPU; leave --{option.replace('_', '-')} out")
        if settings.kv_cache_dtype.startswith("fp"):
            problems.append(unsupported_cpu_cache(settings.kv_cache_dtype))
        if server_args.page_size not in (None, 1):
            problems.append(
                f"page_size: {server_args.page_size}, wanted 1 on a CPU, as SGLang's pages need Triton; "
                "leave --page-size out"
            )
        if settings.enable_dp_attention:
            problems.append("data-parallel attention on a CPU is not there yet; leave --enable-dp-attention out")
        if settings.enable_torch_compile:
            problems.append("torch.compile on a CPU is not there yet; leave --enable-torch-compile out")
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
    if longcat.n_routed_experts % settings.ep_size:
        problems.append(
            f"ep_size: {settings.ep_size}, wanted a divisor of the {longcat.n_routed_experts} FFN experts; "
            "give --ep-size one"
        )
    problems += _unsupported_speculation(server_args, settings)
    return problems + options.refusals(settings, longcat)


def _unsupported_speculation(server_args: Any, settings: Any) -> list[str]:
    algorithm, problems = _algorithm(settings), []
    if algorithm not in (None, *MTP_ALGORITHMS, *(() if settings.device == "cpu" else ("NGRAM",))):
        problems.append(
            f"speculative_algorithm: {algorithm!r}, wanted NEXTN, which drafts with LongCat's own MTP layer"
            + (", or NGRAM" if settings.device != "cpu" else "; NGRAM on a CPU needs sgl_kernel")
            + "; change --speculative-algorithm"
        )
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
        problems.append("speculative_num_steps: None, wanted a number with the other two; give --speculative-num-steps")
    if (branches or 1) > 1 and nodes is None:
        problems.append(
            f"speculative_num_draft_tokens: None, wanted the size of a tree of {branches} branches, its root included; "
            "give --speculative-num-draft-tokens, or leave --speculative-eagle-topk out"
        )
    problems += _impossible_tree(steps, branches, nodes)
    for option in ("speculative_token_map", "speculative_draft_model_quantization", "enable_multi_layer_eagle"):
        if getattr(settings, option):
            flag = option.replace("_", "-")
            problems.append(f"{option} is not there for LongCat's MTP layer; leave --{flag} out")
    backend = settings.speculative_draft_attention_backend
    if settings.device == "cpu" and backend not in (None, CPU_ATTENTION):
        problems.append(
            f"speculative_draft_attention_backend: {backend!r}, wanted our own on a CPU; "
            "leave --speculative-draft-attention-backend out"
        )
    return problems


def _impossible_tree(steps: int | None, branches: int | None, nodes: int | None) -> list[str]:
    """Sizes that SGLang takes, and its worker fails over at the first request."""
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


GATE_OPTION = """--json-model-override-args '{"longcat_draft_gate": true}'"""
"""SGLang's one option that takes what is not an option of its own, and reaches all of its processes."""


def is_gate_asked_for(hf_config: Any) -> bool:
    asked = getattr(hf_config, "longcat_draft_gate", False)
    if not isinstance(asked, bool):
        refuse([f"longcat_draft_gate: {asked!r}, wanted true or false; correct --json-model-override-args"])
    return bool(asked)


def obstacles_to_gate(settings: Any) -> list[str]:
    """Options with which the number of drafts is fixed before a gate can judge them, or drafts are not its own."""
    if not drafts_with_mtp(settings):
        return ["there are no drafts of the MTP layer; give --speculative-algorithm NEXTN"]
    obstacles = []
    if settings.device != "cpu":
        obstacles.append(f"device is {settings.device!r}, where graphs verify a fixed number of drafts")
    if (settings.speculative_eagle_topk or 1) > 1:
        obstacles.append(f"speculative_eagle_topk is {settings.speculative_eagle_topk}, wanted 1, as it judges chains")
    obstacles += [
        f"{option} is set; leave --{option.replace('_', '-')} out"
        for option in ("speculative_adaptive", "speculative_use_rejection_sampling")
        if getattr(settings, option)
    ]
    return obstacles


def drafts_with_mtp(settings: Any) -> bool:
    return _algorithm(settings) in MTP_ALGORITHMS


def _algorithm(settings: Any) -> str | None:
    """As SGLang will spell it; NEXTN and EAGLE are one thing to it."""
    return settings.speculative_algorithm and settings.speculative_algorithm.upper()
