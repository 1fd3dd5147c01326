"""New weights for a running model: updates that are not the model's are refused, and the server goes on as before."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from longcat_core.weights.audit import CheckpointError
from longcat_sglang import loading

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What an update from a disk reads."""

    directory: Path | None
    """Where published tensors are read from on this machine; None if that is not so."""


def say_that_an_update_is_refused(
    original: Callable[..., tuple[bool, str]], updater: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """False, and the reason, if an update has tensors that are not the model's."""
    try:
        return original(updater, *args, **kwargs)
    except CheckpointError as error:
        return False, str(error)


def read_a_whole_checkpoint(
    original: Callable[..., tuple[bool, str]], updater: Any, model_path: str, load_format: str, **kwargs: Any
) -> tuple[bool, str]:
    """False, and the reason, if a checkpoint does not match the model's configuration, which is seen before anything is
    written where its files can be read beforehand. After any other error the weights of before are read again."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.runtime_context import get_model, get_server_args

    model, settings = updater.get_model(), resolved_view(get_server_args())

    def source_of(path: str, written_in: str) -> Any:
        return SimpleNamespace(
            model_path=path,
            load_format=written_in,
            revision=settings.revision,
            download_dir=settings.download_dir,
            speculative_algorithm=settings.speculative_algorithm,
        )

    new = source_of(model_path, load_format)
    before = source_of(updater.model_config.model_path, get_model().load_format)
    try:
        loading.check(loading.local_directory(new), new, model.config.longcat)
    except CheckpointError as error:
        return False, str(error)
    try:
        return _read(original, updater, new, **kwargs)
    except Exception as error:  # of SGLang's own way back, which reads the new files a second time
        logger.warning("LongCat: an update failed; reading the weights of before again, from %s", before.model_path)
        succeeded, message = _read(original, updater, before, **kwargs)
        if not succeeded:
            raise RuntimeError(f"neither the new weights can be read nor those of before: {message}") from error
        of_target = "; the target has the new ones" if model.is_drafter else ""
        return False, f"{error}; the weights of before were read again{of_target}"


def _read(original: Callable[..., tuple[bool, str]], updater: Any, source: Any, **kwargs: Any) -> tuple[bool, str]:
    """As SGLang's own, which says False where it has written nothing, and then still has the path that it refused."""
    model, path = updater.get_model(), updater.model_config.model_path
    model.checkpoint = Checkpoint(loading.directory(source))
    try:
        succeeded, message = original(updater, source.model_path, source.load_format, **kwargs)
    finally:
        model.checkpoint = None
    if not succeeded:
        updater.model_config.model_path = path
    return succeeded, message
