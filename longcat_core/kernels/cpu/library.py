"""The compiled library, which is built with the package where there is a C++ compiler."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from longcat_core.quantization import PUBLISHED_BLOCK
from longcat_core.weights.blocks import FP8, scale_shape

GROUP = 32
"""Numbers that are kept together, as `tiles.h` says."""


def padded(count: int) -> int:
    """As many numbers as whole groups of `tiles.h` have."""
    return -(-count // GROUP) * GROUP


def is_available() -> bool:
    return _found()[0] is not None


def description() -> str:
    """The instruction set that the kernels use here, or why there are none."""
    library, problem = _found()
    if library is None:
        return problem
    name: bytes = library.longcat_instruction_set()
    return name.decode()


def use(instruction_set: str) -> None:
    """Choose among `avx512_bf16`, `avx512`, `avx2`, `generic`, for tests and comparisons; at first it is the quickest.

    Raises:
        ValueError: if this processor does not have it.
        RuntimeError: if the library is not there.
    """
    if not library().longcat_use(instruction_set.encode()):
        raise ValueError(
            f"instruction set {instruction_set!r}: not of this processor, wanted generic or {description()}"
        )


def multiplies_bf16() -> bool:
    """Whether this processor has products in bf16, for which torch's and the engines' kernels are made; on others these
    multiply row by row, or are not there."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_tiles() -> bool:
    """Whether this processor has AMX, for whose products of tiles an engine packs weights."""
    return torch.cpu._is_amx_tile_supported()


def products() -> str:
    """What multiplies many rows in bf16 here, in a sentence."""
    if multiplies_bf16():
        return "the engine's in bf16, as this processor has them"
    if is_available():
        return f"ours in bf16 ({description()})"
    return f"row by row in bf16, which is slow, as this processor has none; our kernels: {description()}"


def library() -> ctypes.CDLL:
    """
    Raises:
        RuntimeError: if it is not there.
    """
    found, problem = _found()
    if found is None:
        raise RuntimeError(f"kernels for CPUs: {problem}")
    return found


def require_bf16(**tensors: Tensor) -> None:
    """
    Raises:
        ValueError: for a tensor of another dtype, or whose last dimension is not contiguous.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: {tensor.dtype} with strides {tensor.stride()}, wanted torch.bfloat16, contiguous in its last "
                "dimension"
            )


def require_weight(name: str, weight: Tensor, scales: Tensor | None) -> None:
    """A weight [..., rows, columns], of bf16 without scales and of FP8 with them.

    Raises:
        ValueError: for another dtype, for columns that are not contiguous, or for scales that are not fp32, contiguous,
            and one for each block of `quantization.PUBLISHED_BLOCK`.
    """
    if scales is None:
        require_bf16(**{name: weight})
        return
    blocks = scale_shape(weight.shape[-2:], PUBLISHED_BLOCK)
    if weight.dtype != FP8 or not weight.is_contiguous():
        raise ValueError(f"{name}: {weight.dtype} with strides {weight.stride()}, wanted {FP8}, contiguous")
    if scales.dtype != torch.float32 or not scales.is_contiguous() or scales.shape != (*weight.shape[:-2], *blocks):
        raise ValueError(
            f"{name}: scales {scales.dtype} {[*scales.shape]}, wanted torch.float32 {[*weight.shape[:-2], *blocks]}, "
            "contiguous"
        )


def storages(*tensors: Tensor | None) -> list[Tensor]:
    """To keep what pointers point to alive, also where a parameter is given another storage."""
    return [tensor.detach() for tensor in tensors if tensor is not None]


def address_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    spec = find_spec(f"{__package__}._kernels")
    if spec is None or spec.origin is None:
        return (
            None,
            "not built, as there was no GCC; install g++, and longcat-serving again",
        )
    try:
        # Its OpenMP is torch's, whose symbols are global: two of them would fight for the cores.
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"{spec.origin} does not load: {error}"
    pointer, number, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    signatures: Sequence[tuple[str, Sequence[type], type | None]] = (
        ("longcat_instruction_set", (), ctypes.c_char_p),
        ("longcat_use", (ctypes.c_char_p,), ctypes.c_int),
        ("longcat_product", (pointer, pointer, number, pointer, number, *[pointer] * 2, *[number] * 3), None),
        ("longcat_experts", (pointer, pointer, number, *[pointer] * 7, *[number] * 5), None),
        ("longcat_attention_scratch", (pointer,), number),
        ("longcat_attention", [pointer] * 7, None),
        ("longcat_prompt_scratch", (pointer,), number),
        ("longcat_prompt", [pointer] * 6, None),
        ("longcat_write_latents", (*[pointer, number] * 3, pointer, *[number] * 3), None),
        ("longcat_rms_norm", (pointer, pointer, *[pointer, number] * 2, pointer, real, number, number), None),
        ("longcat_rotate", (pointer, number, number, pointer, pointer, *[number] * 3), None),
        ("longcat_mla", (*[pointer] * 3, number, pointer), None),
        ("longcat_add_choices", (*[pointer] * 5, number, pointer, *[number] * 5), None),
        ("longcat_half_layer", (*[pointer] * 5, number, pointer, number, pointer), None),
        ("longcat_mtp", (*[pointer] * 3, number, pointer, number, pointer), None),
        ("longcat_draft", (*[pointer] * 5, number, pointer, pointer, number, pointer), None),
        ("longcat_chain", (*[pointer] * 4, number, pointer, pointer, number, pointer, number), None),
        ("longcat_choose", (pointer, pointer, number, pointer, pointer, *[number] * 3), None),
        ("longcat_route", (*[pointer] * 5, real, *[number] * 4), None),
    )
    for name, arguments, result in signatures:
        function = getattr(found, name, None)
        if function is None:
            return None, f"{spec.origin} is of another version, without {name}; install longcat-serving again"
        function.argtypes, function.restype = arguments, result
    return found, ""
