"""What `interpreter.py` repairs is still wrong in Triton's interpreter. A test that fails says what may go there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from tests.kernels import interpreter


def tile(numbers: list[list[float]]) -> Any:
    return TensorHandle(np.array(numbers, dtype=np.float32), tl.float32)


def in_bf16(numbers: list[list[float]]) -> Any:
    return interpreter.convert(interpreter_builder, tile(numbers), tl.bfloat16)


def test_the_interpreter_still_multiplies_the_bits_of_bf16() -> None:
    arguments = (in_bf16([[2.0]]), in_bf16([[3.0]]), tile([[0.0]]), None, None)
    assert interpreter.REAL_DOT(interpreter_builder, *arguments).data.item() == 0x4000 * 0x4040
    assert interpreter.dot(interpreter_builder, *arguments).data.item() == 6.0


def test_the_interpreter_still_cuts_numbers_off_for_bf16() -> None:
    exact = 1 + 2**-8 + 2**-10
    cut = interpreter.REAL_CAST(interpreter_builder, tile([[exact]]), tl.bfloat16)
    assert interpreter.as_torch(cut).item() == 1.0
    assert interpreter.as_torch(in_bf16([[exact]])).item() == torch.tensor(exact).bfloat16().item() == 1 + 2**-7


def test_the_interpreter_still_loses_the_carry_of_fp8() -> None:
    wrong = interpreter.REAL_FP_TO_FP(interpreter_builder, tile([[1.999]]), tl.float8e4nv, ir.ROUNDING_MODE.RTNE)
    assert interpreter.as_torch(wrong).item() == 1.0
    right = interpreter.convert(interpreter_builder, tile([[1.999, 1e9]]), tl.float8e4nv)
    assert interpreter.as_torch(right).tolist() == [[2.0, 448.0]]


def test_the_interpreter_still_takes_a_compared_scalar_for_an_integer() -> None:
    three = TensorHandle(np.array([3]), tl.int64)
    compared = interpreter_builder.create_icmpSGE(three, three)
    shape = tl.block_type(tl.int1, [4])
    assert interpreter.REAL_SPLAT(interpreter_builder, shape, compared).data.dtype == np.int64
    assert interpreter.splat(interpreter_builder, shape, compared).data.dtype == np.bool_
