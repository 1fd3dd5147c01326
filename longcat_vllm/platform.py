"""What a CPU needs: vLLM's CPU platform, with chunked prefill, prefix caching and any block size left to LongCat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from longcat_vllm.compat import drafts_with_mtp, is_longcat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform
else:
    CpuPlatform = resolve_obj_by_qualname(cpu_platform_plugin())  # plain or Zen, as vLLM would have chosen

logger = init_logger(__name__)


class LongcatCpuPlatform(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """vLLM turns chunked prefill and prefix caching off for any MLA model and forces blocks of 16, because its
        CPU_MLA kernel asks for it (platforms/cpu.py:235,521 in 0.32). `attention.LatentAttentionBackend` does not.
        """
        model = vllm_config.model_config
        if not is_longcat(model):
            super().check_and_update_config(vllm_config)
            return
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chunked, prefix, budget = (
            scheduler.enable_chunked_prefill,
            cache.enable_prefix_caching,
            scheduler.max_num_batched_tokens,
        )
        block_size = cache.block_size if cache.user_specified_block_size else None
        super().check_and_update_config(vllm_config)
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked, prefix
        scheduler.max_num_batched_tokens = budget
        if block_size is not None:
            cache.block_size = block_size
        if drafts_with_mtp(vllm_config):
            # Padded batches save a synchronisation that a CPU has not. They draft over rejected tokens too, and take
            # the prompt's last token for the one that follows a chunk (prepare_next_token_ids_padded in 0.32).
            vllm_config.speculative_config.disable_padded_drafter_batch = True
        logger.info_once(
            "LongCat-Flash on a CPU keeps chunked prefill (%s) and prefix caching (%s) as they were set.",
            chunked,
            prefix,
        )
