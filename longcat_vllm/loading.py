"""Load formats: which files vLLM will read, and whether they can be checked against the configuration beforehand."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from longcat_core.config import LongcatConfig
from longcat_core.weights import checkpoint
from longcat_core.weights.audit import CheckpointError
from longcat_vllm.engine import drafts_with_mtp, mtp_speculation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

SAFETENSORS_OR_TORCH = ("auto", "hf")
"""Formats that read safetensors, or torch's files if there are no safetensors."""
SAFETENSORS = ("safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Formats that read published names from safetensors, and nothing else."""
SHARDED = ("sharded_state", "runai_streamer_sharded")
"""Formats of vLLM's own parameters, as saved by vLLM, one file for each rank."""


def check(vllm_config: VllmConfig, config: LongcatConfig) -> None:
    """Check the checkpoint against its configuration if it can be read here; otherwise log once that it was not.

    Raises:
        CheckpointError: as `checkpoint.verify`.
    """
    if vllm_config.load_config.load_format == "dummy":
        return
    directory, obstacle = _readable(vllm_config)
    if directory is None:
        logger.info("LongCat's checkpoint is not checked before it is loaded: %s.", obstacle)
    else:
        checkpoint.verify(directory, config, requires_mtp=drafts_with_mtp(vllm_config))


def directory(vllm_config: VllmConfig) -> Path | None:
    """Where published tensors are read from on this machine; None if that is not so, or not known."""
    return None if vllm_config.load_config.load_format == "dummy" else _readable(vllm_config)[0]


def mtp_weights_in_fp8(vllm_config: VllmConfig) -> frozenset[str]:
    """The published weights of the MTP layer that are served in FP8: those that files which can be read now have in it.

    Of other sources the layer's tensors are not known before they come, and served in bf16, whatever they are.
    """
    of = directory(vllm_config)
    return frozenset() if of is None else checkpoint.mtp_weights_in_fp8(of)


def unsupported(vllm_config: VllmConfig) -> list[str]:
    """Drafts from a saved state, which holds the model alone; their loader would look for them in its files."""
    load, speculation = vllm_config.load_config, mtp_speculation(vllm_config)
    if load.load_format not in SHARDED or speculation is None or speculation.draft_load_config is not None:
        return []
    return [
        f"load_format: {load.load_format!r}, wanted one that reads a published checkpoint with drafts, as a saved "
        "state has no MTP layer; leave --speculative-config or --load-format out"
    ]


def _readable(vllm_config: VllmConfig) -> tuple[Path | None, str]:
    """The directory whose safetensors vLLM will read by their published names; None, with the reason, if none."""
    model, load_format = vllm_config.model_config, vllm_config.load_config.load_format
    if load_format not in (*SAFETENSORS_OR_TORCH, *SAFETENSORS):
        return None, f"load format {load_format!r} reads no published names from safetensors"
    if model.model_weights:
        return None, f"it is at {model.model_weights}"
    directory = Path(model.model)
    if not directory.is_dir():
        return _cached(model.model, model.revision, vllm_config.load_config.download_dir)
    has_torch_files = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
    if load_format in SAFETENSORS_OR_TORCH and has_torch_files and not any(directory.glob("*.safetensors")):
        return None, f"{directory} has torch's files only"
    return directory, ""


def _cached(name: str, revision: str | None, cache: str | None) -> tuple[Path | None, str]:
    """Where the Hub's cache has all of a checkpoint, as it has after a download."""
    try:
        snapshot = Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
        checkpoint.shards(snapshot)
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None, f"{name} is not, or not wholly, in the Hub's cache here"
    return snapshot, ""
