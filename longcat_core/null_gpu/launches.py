"""Counts launches: of CUDA kernels, of products and collectives in NVIDIA's libraries, of Triton's kernels."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import re
from collections import Counter
from functools import cache

from longcat_core.null_gpu import flashinfer_modules, triton_driver, world

KINDS: tuple[tuple[str, str], ...] = (
    (
        "collective",
        r"^nccl|^torch.distributed|cross_device_reduce|all_?reduce|all_?gather|reduce_?scatter|multimem|deep_ep|nvshmem",
    ),
    ("experts", r"fused_moe|run_moe|m_grouped|^triton (gate_up|down)_kernel"),
    ("routing", r"moe_|topk|TopK|bitonicSort|softmax_warp|expert|^triton (route|count|sum|place|combine)_kernel"),
    ("product", r"^cublas|gemm|splitK|router_product"),
    ("cache", r"_and_cache|slot_mapping|block_table|gather_\w*cache|set_\w*kv_buffer"),
    ("norm", r"rms_?norm|layer_?norm"),
    ("activation", r"act_and_mul|silu|run_activation"),
    ("rotary", r"rope|rotary"),
    ("quantise", r"quant|scaled_fp8"),
    ("attention", r"flash(?!infer)|mla|Mla|Fmha|fmha|attn|attention|merge_states"),
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
    launches.update(world.COLLECTIVES)
    return launches


_AROUND = re.compile(r"cutlass::device_kernel|cutlass::Kernel2?|\w+::enable_sm\w+")
"""Kernels that are named after their first template argument."""
_OF_PYTORCH = ("elementwise_kernel", "elementwise_kernel_with_index", "reduce_kernel")
_COMPUTES = re.compile(r"(\w+?)_kernel_cuda\b|CUDAFunctor\w*?_(\w+)|(\w+?)Functor\b|(\w+?)_kernel_impl\b")
_NOTHING = {"gpu", "gpu_index", "Binary", "AUnary", "BUnary", "CUDA"}
_HASH = re.compile(r"\.[0-9a-f]{32}$")
"""Of a kernel that is compiled when it is needed."""


@cache
def short(mangled: str) -> str:
    """The name of a kernel without its types; of PyTorch's elementwise kernels, with what they compute."""
    full = demangled(mangled).replace("(anonymous namespace)::", "")
    if full == mangled:
        return _HASH.sub("", mangled)
    name = _plain(full)
    while _AROUND.fullmatch(name):
        full = full[full.index("<") + 1 :]
        name = _plain(full)
    if name.endswith(_OF_PYTORCH):
        found = (next(filter(None, groups)) for groups in _COMPUTES.findall(full))
        return " ".join([name.rpartition("::")[2], *[each for each in found if each not in _NOTHING][:1]])
    return name


def _plain(full: str) -> str:
    """`std::enable_if<a, void>::type vllm::f<int>(int*)` -> `vllm::f`; of a template argument, up to the next one."""
    angles, parentheses, outside = 0, 0, ""
    for character in full:
        if not angles and character in "(,>":
            break
        parentheses += (character == "(") - (character == ")")
        if not parentheses:  # within them, `>` may compare
            angles += (character == "<") - (character == ">")
        if not angles and character != ">":
            outside += character
    return outside.split()[-1] if outside.split() else full


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
