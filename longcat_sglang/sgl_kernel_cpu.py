"""Stands in for `sgl_kernel` on a CPU without it: SGLang 0.5.21 imports these names whatever it serves.

All are steps of speculation, which is not there yet for LongCat-Flash on a CPU (`compat.check_deployment`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

_IMPORTED = (
    "copy_all_layer_kv_cache_cpu",  # kernels/ops/kvcache/cache_move.py
    "assign_req_to_token_pool_cpu",  # mem_cache/allocation.py
    "assign_extend_cache_locs_cpu",  # speculative/*, as all below
    "assign_draft_cache_locs_contiguous_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "build_tree_kernel_efficient_cpu",
    "verify_tree_greedy_cpu",
)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name not in _IMPORTED:
        raise AttributeError(f"sgl_kernel is not installed, and LongCat-Flash does without its {name}")

    def absent(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name}: sgl_kernel is not installed; leave --speculative-algorithm out")

    return absent
