"""Load formats: which files SGLang will read, and if they can be checked against the configuration beforehand."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from longcat_core.config import LongcatConfig
from longcat_core.weights import checkpoint
from longcat_sglang.engine import drafts_with_mtp

logger = logging.getLogger(__name__)


def local_directory(settings: Any) -> Path | None:
    """The checkpoint on this machine, if it is here: its directory, or its snapshot in the cache of the Hub."""
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


def directory(settings: Any) -> Path | None:
    """Where published tensors are read from on this machine; None if that is not so."""
    return local_directory(settings) if settings.load_format in READS_PUBLISHED_TENSORS else None


def check(directory: Path | None, settings: Any, longcat: LongcatConfig) -> None:
    """Check the checkpoint against its configuration if it can be read here; otherwise log that it was not.

    Raises:
        CheckpointError: as `checkpoint.verify`.
    """
    readable, reason = _readable(directory, settings)
    if readable is None:
        logger.info("The checkpoint is not checked before it is loaded: %s.", reason)
        return
    checkpoint.verify(readable, longcat, requires_mtp=drafts_with_mtp(settings))


def mtp_weights_in_fp8(settings: Any) -> frozenset[str]:
    """The published weights of the MTP layer that are served in FP8: those that files which can be read now have in it.

    Of other sources the layer's tensors are not known before they come, and served in bf16, whatever they are.
    """
    directory, _ = _readable(local_directory(settings), settings)
    return frozenset() if directory is None else checkpoint.mtp_weights_in_fp8(directory)


def _readable(directory: Path | None, settings: Any) -> tuple[Path | None, str]:
    """The checkpoint if its published safetensors are in `directory`; otherwise why it cannot be read."""
    if settings.load_format not in READS_PUBLISHED_TENSORS:
        return None, f"--load-format {settings.load_format} does not read published safetensors"
    if directory is None:
        return None, f"{settings.model_path} is not on this machine yet"
    if not any(directory.glob("*.safetensors")) and (found := [*directory.glob("*.bin"), *directory.glob("*.pt")]):
        return None, f"{found[0].name} is not safetensors"
    return directory, ""
