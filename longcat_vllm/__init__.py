"""All that the plugin tells vLLM, on one screen."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process of vLLM, whatever model it serves.

    Installs the hooks that every process needs (`hooks.HOOKS`). Harmless when called again. Never raises: what
    could not be hooked is logged once by name, and becomes an error when a LongCat model is requested. A vLLM of
    another version is left as it is.
    """
    from longcat_core.plugin.hooks import Stage
    from longcat_vllm.engine import VLLM
    from longcat_vllm.hooks import HOOKS

    VLLM.install(HOOKS, Stage.PROCESS)
