"""Counts launches: of CUDA kernels, of products and collectives in NVIDIA's libraries, of Triton's kernels."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import re
from collections import Counter
from functools import cache

from longcat_core.null_gpu import flashinfer_modules, triton_driver

KINDS: tuple[tuple[str, str], ...] = (
    ("collective", r"^nccl|cross_device_reduce|all_?reduce|all_?gather|reduce_?scatter|multimem|deep_ep|nvshmem"),
    ("cache", r"_and_cache|slot_mapping|block_table|gather_\w*cache"),
    ("attention", r"flash|mla_|Mla|Fmha|fmha|attn|attention|merge_states"),
    ("experts", r"fused_moe_kernel|grouped_gemm|moe.*gemm|gemm.*moe|m_grouped"),
    ("routing", r"moe_align|count_and_sort|moe_sum|topk|bitonicSort|softmax_warp|moe_|expert|gatherTopK|permute"),
    ("product", r"^cublas|gemm|Gemm|splitK|router_gemm"),
    ("quantise", r"quant|fp8|scaled_"),
    ("norm", r"rms_norm|layer_norm"),
    ("activation", r"act_and_mul|silu"),
)
"""What a kernel is for, by its name; the first that fits."""

OTHER = "copies and arithmetic"


@cache
def kind_of(name: str) -> str:
    """name: as `short` gives it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def counted() -> Counter[str]:
    """Launches by kernel since the process started, under the short names of kernels."""
    library = ctypes.CDLL(None)
    library.null_gpu_counters.restype = ctypes.c_size_t
    library.null_gpu_counter_name.restype = ctypes.c_char_p
    library.null_gpu_counter_launches.restype = ctypes.c_ulonglong
    launches: Counter[str] = Counter()
    for i in range(library.null_gpu_counters()):
        launches[short(library.null_gpu_counter_name(i).decode())] += library.null_gpu_counter_launches(i)
    for name, count in triton_driver.LAUNCHES.items():
        launches[f"triton {name}"] += count
    launches.update(flashinfer_modules.CALLS)
    return launches


_AROUND = re.compile(
    r"^(void |\(anonymous namespace\)::|cutlass::device_kernel<|\w*::enable_sm\w+<|cutlass::Kernel\d?<)"
)
_FUNCTOR = re.compile(r"(\w+?)_kernel_cuda|CUDAFunctor_(\w+)|(\w+?)Functor|(\w+?)_kernel_impl|(\w+)_outer")


@cache
def short(mangled: str) -> str:
    """The name of a kernel without its types; of PyTorch's elementwise kernels, with what they compute."""
    name = demangled(mangled)
    while (rest := _AROUND.sub("", name)) != name:
        name = rest
    plain = re.split(r"[<(]", name, maxsplit=1)[0].strip()
    if plain.endswith(("elementwise_kernel", "elementwise_kernel_with_index", "reduce_kernel")):
        found = [next(filter(None, groups)) for groups in _FUNCTOR.findall(name[len(plain) :])]
        inner = [each for each in found if each not in ("Binary", "AUnary", "BUnary", "gpu_kernel", "gpu_index")]
        return f"{plain.rpartition('::')[2]} {inner[0] if inner else ''}".strip()
    return plain


def demangled(mangled: str) -> str:
    if not mangled.startswith("_Z"):
        return mangled
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = library.__cxa_demangle(mangled.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return mangled
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return name
