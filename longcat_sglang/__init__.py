"""All that the plugin tells SGLang, on one screen."""

from __future__ import annotations


def register() -> None:
    """Entry point `sglang.srt.plugins`: runs in every process of SGLang, whatever model it serves.

    Harmless when called again. Never raises: what could not be hooked is logged once by name, and becomes an error
    when a LongCat model is asked for (`Engine.require_supported`).
    """
    from longcat_sglang import compat

    compat.SGLANG.hook("model class", compat.install_model_class)
    compat.SGLANG.hook("configuration class", compat.install_config_class)
    compat.SGLANG.hook("checkpoint check", compat.install_config_check)
    compat.SGLANG.hook("attention backend", compat.install_attention_backend)
    compat.SGLANG.hook("prompt check", compat.install_prompt_check)
    compat.SGLANG.hook("draft attention", compat.install_draft_attention)
    compat.SGLANG.hook("sampled verification", compat.install_sampled_verification)
    compat.SGLANG.hook("draft gate", compat.install_draft_gate)


def register_platform() -> None:
    """Entry point `sglang.srt.platforms`: prepares a CPU, and leaves the choice of the platform to SGLang.

    SGLang calls it when it is imported, before anything that needs what is prepared; a platform of our own would
    turn its speculation off (speculative/eagle_worker_v2.py in 0.5.21).
    """
    from longcat_sglang.platform import prepare_cpu

    prepare_cpu()
