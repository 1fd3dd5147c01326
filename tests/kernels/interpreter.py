"""What Triton's interpreter gets wrong, put right with torch's own arithmetic, so that bf16 and FP8 can be tested."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TORCH = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float16: (torch.float16, np.float16),
    tl.float32: (torch.float32, np.float32),
}
"""Types of Triton as torch has them, and as the interpreter stores them: numpy knows neither bf16 nor FP8."""


def as_torch(handle: Any) -> Tensor:
    """The numbers of a tile, as torch's."""
    return torch.from_numpy(np.ascontiguousarray(handle.data)).view(TORCH[handle.dtype.scalar][0])


def convert(builder: Any, handle: Any, to: Any, *_rounding: Any) -> Any:
    """To another type, rounded to the nearest, ties to even, and to the greatest FP8 number where it is greater."""
    source, target = handle.dtype.scalar, to.scalar
    if source not in TORCH or target not in TORCH:
        return REAL_CAST(builder, handle, to)
    numbers = as_torch(handle)
    if target == tl.float8e4nv:
        limit = torch.finfo(torch.float8_e4m3fn).max
        numbers = numbers.float().clamp(-limit, limit)
    dtype, stored = TORCH[target]
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.float32}[dtype.itemsize]
    return TensorHandle(numbers.to(dtype).view(bits).numpy().view(stored), target)


def dot(builder: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
    """A product whose operands are widened to fp32 first."""
    a, b = (convert(builder, operand, tl.float32) for operand in (a, b))
    return REAL_DOT(builder, a, b, accumulator, *precision)


def splat(builder: Any, shape: Any, scalar: Any) -> Any:
    """A scalar as a tile; that of a comparison is one of truth values, not of the type of what was compared."""
    if scalar.data.dtype == np.bool_:
        scalar = TensorHandle(scalar.data, tl.int1)
    return REAL_SPLAT(builder, shape, scalar)


REAL_CAST, REAL_DOT = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
REAL_SPLAT, REAL_FP_TO_FP = InterpreterBuilder.create_splat, InterpreterBuilder.create_fp_to_fp


@cache
def builtins(package: Any) -> list[tuple[str, Any]]:
    """Members that the interpreter replaces, looked for once: it does so at each call, in half of its time."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name, member in builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def repair() -> None:
    """Of this process, for good."""
    interpreter._patch_builtin = patch_builtins
    InterpreterBuilder.cast_impl = convert
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_splat = splat
