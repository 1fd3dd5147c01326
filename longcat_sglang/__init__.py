"""All that the plugin tells SGLang, on one screen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations


def register() -> None:
    """Entry point `sglang.srt.plugins`: runs in every process of SGLang, whatever model it serves.

    Installs the hooks that every process needs (`hooks.HOOKS`). Harmless when called again. Never raises: what
    could not be hooked is logged once by name, and becomes an error when a LongCat model is requested. An SGLang of
    another version is left as it is.
    """
    from longcat_core.plugin.hooks import Stage
    from longcat_sglang.engine import SGLANG
    from longcat_sglang.hooks import HOOKS

    SGLANG.install(HOOKS, Stage.PROCESS)


def register_platform() -> None:
    """Entry point `sglang.srt.platforms`: prepares a CPU for a LongCat, and leaves the platform's choice to SGLang. An
    SGLang of another version is left as it is.

    SGLang calls it when it is imported, before anything that needs the preparation; a platform of our own would
    turn off its speculation (speculative/eagle_worker_v2.py in 0.5.21).
    """
    from longcat_sglang.engine import SGLANG

    if not SGLANG.is_supported():
        return
    from longcat_sglang.devices.cpu.platform import prepare_cpu
    from longcat_sglang.one_batch import load_plugins_for_one_batch

    prepare_cpu()
    load_plugins_for_one_batch()
